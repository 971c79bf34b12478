"""What perdure costs, and what a peer costs beside it: `make bench`, or `python -m benchmarks --only drain`.

    drain      a backlog of one-step workflows, one worker process and two; beside plain SQL and the peers
    starting   starts from many callers, and many in one call
    pickup     from a start in one process to the first step in another, whose worker is idle
    messages   from a message in one process to the step behind `recv` in another, in a workflow out of memory
    asking     from `handle.ask` in one process to the answer of a workflow in another
    children   one workflow with ten thousand children, beside as many workflows without a parent
    streaming  entries that steps write to streams
    latency    app.run of a one-step workflow, beside one durable insert of a row
    sequence   one workflow of a thousand steps, one after the other
    idle       what a worker takes that has nothing to do
    crowd      ten thousand workflows at once: what they need of a worker's memory
    beginning  from the import to the first statement
    payloads   arguments and results of a MiB each
    scaling    more workers on one server; many that are idle, and many who wait for results
    ageing     throughput under a pinned snapshot, among a million that have ended, while they are removed, and others

Everything runs on one server with durable settings, alternating, in one run: what counts are the ratios. The results go
to results/latest.json as well.
"""
