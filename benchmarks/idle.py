"""What a worker takes that has nothing to do: memory, processor, connections.

Looked at when it has been idle for so long that it has closed the connections which it opened at its start. As that
takes its time, all repetitions run beside each other: they have nothing to do, either.
"""

from __future__ import annotations

import time
from contextlib import ExitStack

from psycopg.conninfo import make_conninfo

from benchmarks.bench import Bench, Connection
from benchmarks.figures import Figure
from benchmarks.processes import processor_seconds, resident_mib, role
from benchmarks.program import SCHEMA
from perdure.config import DATABASE_URL

SECONDS = 10
_SETTLED_SECONDS = 35


def measure(bench: Bench) -> list[Figure]:
    """Start them, let them settle, and look at them for a while."""
    names = [f"idle_{number}" for number in range(bench.repeats)]
    with ExitStack() as stack:
        workers = [
            stack.enter_context(role("worker", 100, env={DATABASE_URL: _url(bench, name), SCHEMA: name})).pid
            for name in names
        ]
        connection = stack.enter_context(bench.connect())
        time.sleep(_SETTLED_SECONDS)
        before, server_before = [processor_seconds(worker) for worker in workers], bench.server_seconds()
        time.sleep(SECONDS)
        processor = [
            (processor_seconds(worker) - then) / SECONDS * 100 for worker, then in zip(workers, before, strict=True)
        ]
        server = (bench.server_seconds() - server_before) / SECONDS * 100 / len(workers)
        memory = [resident_mib(worker) for worker in workers]
        connections = [_connections(connection, name) for name in names]
    return [
        Figure(name="memory (RSS)", unit="MiB", values=memory, target=70, better="less"),
        Figure(name="processor, worker", unit="% of a core", values=processor, target=2, better="less"),
        Figure(name="processor, server, for each", unit="% of a core", values=[server], better="less"),
        Figure(name="connections, at most", unit="", values=[max(connections)], target=3, better="less"),
    ]


def _url(bench: Bench, name: str) -> str:
    """The database, with a name by which the worker's connections can be told from others."""
    return make_conninfo(bench.cluster.url, application_name=name)


def _connections(connection: Connection, name: str) -> int:
    ((counted,),) = connection.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", [name]
    ).fetchall()
    return int(counted)
