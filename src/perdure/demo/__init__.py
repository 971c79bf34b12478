"""`perdure demo`: the main job on real input, with a worker that is killed in the middle.

program   what runs: one workflow a file             worker_process   one of the workers
stage     the schema and the files that it plays on  workers          the workers, seen from outside
play      what happens, from start to end            proof            the SQL that says whether it worked
"""
