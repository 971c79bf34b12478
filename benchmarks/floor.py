"""The floor: what PostgreSQL itself takes for the same rows, written in batches by SQL alone.

`python -m benchmarks.floor CLIENTS` drains a backlog of one-step workflows without running them: each client claims a
hundred in one transaction, and in a second one writes their steps and results and removes them from the queue. No value
travels but the ids. It ends when its stdin does. No engine that keeps the same guarantees on the same tables can be
faster.
"""

from __future__ import annotations

import os
import sys
import threading

import psycopg

from benchmarks.program import SCHEMA, TEXT
from perdure.config import DATABASE_URL

BATCH = 100

_CLAIM = """
    UPDATE {schema}.queue_entries
    SET worker_id = %(worker)s, epoch = epoch + 1, started_at = now()
    WHERE shard = 1 AND workflow_id = ANY (ARRAY(
        SELECT workflow_id FROM {schema}.queue_entries
        WHERE shard = 1 AND queue = 'default' AND worker_id IS NULL
        ORDER BY priority DESC, enqueued_at, workflow_id
        LIMIT {batch}
        FOR UPDATE SKIP LOCKED))
    RETURNING workflow_id
"""
_FINISH = """
    WITH done AS (
        DELETE FROM {schema}.queue_entries
        WHERE shard = 1 AND workflow_id = ANY (ARRAY(SELECT unnest(%(ids)s::uuid[])))
        RETURNING workflow_id, started_at
    ), steps AS (
        INSERT INTO {schema}.checkpoints
            (shard, workflow_id, key, kind, position, status, payload, args_hash, attempts, version, started_at,
             created_at, worker_id, epoch)
        SELECT 1, workflow_id, 'echo', 'step', 1, 'success', %(payload)s::json, 7, 1, '1', now(), now(), %(worker)s, 1
        FROM done
    )
    INSERT INTO {schema}.checkpoints
        (shard, workflow_id, key, kind, position, status, payload, recoveries, version, started_at, created_at,
         worker_id, epoch)
    SELECT 1, workflow_id, '$result', 'result', 2147483647, 'success', %(payload)s::json, 0, '1', started_at, now(),
           %(worker)s, 1
    FROM done
"""


def drain(url: str, schema: str, number: int) -> None:
    """One client, until nothing is left."""
    worker = f"00000000-0000-0000-0000-{number:012d}"
    claim, finish = (text.format(schema=schema, batch=BATCH).encode() for text in (_CLAIM, _FINISH))
    with psycopg.connect(url, autocommit=True, prepare_threshold=0) as connection:
        cursor = connection.cursor(binary=True)
        while ids := [id for (id,) in cursor.execute(claim, {"worker": worker}).fetchall()]:
            cursor.execute(finish, {"ids": ids, "payload": f'"{TEXT}"', "worker": worker})


def main(clients: int) -> None:
    """So many at once."""
    url, schema = os.environ[DATABASE_URL], os.environ[SCHEMA]
    print("works", flush=True)
    threads = [threading.Thread(target=drain, args=(url, schema, number)) for number in range(clients)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(int(sys.argv[1]))
