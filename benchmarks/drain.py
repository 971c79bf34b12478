"""A backlog of one-step workflows, started beforehand by a client, drained by one worker process; beside DBOS.

The time is the database's own: from the first claim to the last result. The views tell whether all of it was run.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from subprocess import Popen

from psycopg.conninfo import conninfo_to_dict

from benchmarks.bench import Bench
from benchmarks.dbos_peer import SETTINGS
from benchmarks.figures import Figure
from benchmarks.processes import processor_seconds, role, run
from benchmarks.program import SCHEMA
from perdure.config import DATABASE_URL

COUNT = 30_000
PEER_COUNT = 400
CONCURRENCIES = (100, 1000)
"""The default, and one that was tuned: more in flight makes larger claims and flushes."""

_PATIENCE_SECONDS = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained:
    """One backlog.

    Attributes:
        rate: Workflows a second.
        worker: Processor time of the worker, in µs a workflow.
        server: That of PostgreSQL.
    """

    rate: float
    worker: float
    server: float


def measure(bench: Bench) -> list[Figure]:
    """Alternating: each of ours, each of theirs, and over again."""
    ours: dict[str, list[Drained]] = defaultdict(list)
    theirs: dict[str, list[Drained]] = defaultdict(list)
    for _ in range(bench.repeats):
        for concurrency in CONCURRENCIES:
            ours[f"concurrency {concurrency}"].append(_perdure(bench, concurrency))
        for setting in SETTINGS:
            theirs[setting].append(_dbos(bench, setting))
    best, peer = _best(ours), _best(theirs)
    figures = [Figure(name=f"perdure, {name}", unit="workflows/s", values=_rates(all)) for name, all in ours.items()]
    figures += [Figure(name=f"dbos, {name}", unit="workflows/s", values=_rates(all)) for name, all in theirs.items()]
    ratios = [mine.rate / other.rate for mine, other in zip(ours[best], theirs[peer], strict=True)]
    return [
        *figures,
        Figure(name="perdure, the better", unit="workflows/s", values=_rates(ours[best]), target=6000, note=best),
        Figure(name="perdure / dbos", unit="times", values=ratios, target=40, note=f"{best}, over dbos, {peer}"),
        Figure(name="perdure, worker", unit="us/workflow", values=[one.worker for one in ours[best]], better="less"),
        Figure(name="perdure, server", unit="us/workflow", values=[one.server for one in ours[best]], better="less"),
        Figure(name="dbos, worker", unit="us/workflow", values=[one.worker for one in theirs[peer]], better="less"),
        Figure(name="dbos, server", unit="us/workflow", values=[one.server for one in theirs[peer]], better="less"),
    ]


def _rates(drained: list[Drained]) -> list[float]:
    return [one.rate for one in drained]


def _best(all: dict[str, list[Drained]]) -> str:
    return max(all, key=lambda name: sorted(_rates(all[name]))[len(all[name]) // 2])


def _perdure(bench: Bench, concurrency: int) -> Drained:
    count, schema = bench.count(COUNT), bench.fresh_schema()
    env = {DATABASE_URL: bench.cluster.url, SCHEMA: schema}
    run("starter", count, env=env)
    with bench.connect() as connection:

        def left() -> int:
            ((counted,),) = connection.execute(f"SELECT sum(pending + running) FROM {schema}.queues").fetchall()
            return count if counted is None else int(counted)

        with role("worker", concurrency, env=env) as worker:
            cost = _watch(bench, worker, left)
        ((seconds, ended),) = connection.execute(
            f"""
            SELECT extract(epoch FROM max(completed_at) - min(started_at))::float8, count(*)
            FROM {schema}.workflows WHERE status = 'success'
            """
        ).fetchall()
        ((steps,),) = connection.execute(
            f"SELECT count(*) FROM {schema}.workflow_steps WHERE status = 'success'"
        ).fetchall()
        assert (ended, steps) == (count, count), f"{ended} workflows and {steps} steps of {count} are recorded"
        connection.execute(f"DROP SCHEMA {schema} CASCADE")
    return Drained(rate=count / seconds, worker=cost[0] / count * 1e6, server=cost[1] / count * 1e6)


def _dbos(bench: Bench, setting: str) -> Drained:
    count, database = bench.count(PEER_COUNT), bench.fresh_database()
    given = conninfo_to_dict(database)
    url = f"postgresql+psycopg://{given['user']}@/{given['dbname']}?host={given['host']}&port={given.get('port', 5432)}"
    run("dbos_peer", "start", url, setting, count)
    with bench.connect(database) as connection:

        def left() -> int:
            ((ended,),) = connection.execute(
                "SELECT count(*) FROM dbos.workflow_status WHERE status = 'SUCCESS'"
            ).fetchall()
            return count - int(ended)

        with role("dbos_peer", "work", url, setting) as worker:
            cost = _watch(bench, worker, left)
        ((seconds, ended),) = connection.execute(
            """
            SELECT (max(completed_at) - min(started_at_epoch_ms))::float8 / 1000, count(*)
            FROM dbos.workflow_status WHERE status = 'SUCCESS'
            """
        ).fetchall()
        ((steps,),) = connection.execute("SELECT count(*) FROM dbos.operation_outputs").fetchall()
        assert (ended, steps) == (count, count), f"{ended} workflows and {steps} steps of {count} are recorded"
    return Drained(rate=count / seconds, worker=cost[0] / count * 1e6, server=cost[1] / count * 1e6)


def _watch(bench: Bench, worker: Popen[str], left: Callable[[], int]) -> tuple[float, float]:
    """Wait until nothing is left; returns the processor time of the worker and of the server."""
    before = processor_seconds(worker.pid), bench.server_seconds()
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while left():
        if worker.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the worker leaves {left()} workflows undone")
        time.sleep(0.25)  # counting costs the server some milliseconds
    return processor_seconds(worker.pid) - before[0], bench.server_seconds() - before[1]
