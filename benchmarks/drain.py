"""A backlog of one-step workflows, started beforehand by a client, drained by one worker process and by two.

Beside it, in turn: PostgreSQL itself with the same rows (`floor`), other systems of durable workflows with the same
workflow, and job queues with jobs that do nothing. The time is the database's own: from the first claim to the last
result; the tables tell whether all of it was run.
"""

from __future__ import annotations

import importlib
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from subprocess import Popen
from typing import Any

from psycopg.conninfo import conninfo_to_dict

from benchmarks import peers
from benchmarks.bench import Bench, Connection
from benchmarks.figures import Figure
from benchmarks.peers import Peer
from benchmarks.processes import processor_seconds, role, run
from benchmarks.program import SCHEMA
from perdure.config import DATABASE_URL

COUNT = 30_000
# Each is the modules that work beside each other, with their arguments.
ONE_PROCESS = {
    "perdure, concurrency 100": [("worker", 100)],
    "perdure, concurrency 1000": [("worker", 1000)],
}
"""The default, and one that was tuned: more in flight makes larger claims and flushes."""
TWO_PROCESSES = {"perdure, two processes": [("worker", 1000), ("worker", 1000)]}
FLOORS = {f"floor, {clients} clients": [("floor", clients)] for clients in (1, 4, 8)}

_PATIENCE_SECONDS = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained:
    """One backlog; all but the rate for each workflow.

    Attributes:
        rate: Workflows a second.
        worker: Processor time of the workers, in us.
        server: That of PostgreSQL.
        log: Bytes of its log.
        commits: Its commits.
        statements: Statements, and so round trips.
    """

    rate: float
    worker: float
    server: float
    log: float
    commits: float
    statements: float


def measure(bench: Bench) -> list[Figure]:
    """Alternating: each of ours, each of theirs, and over again."""
    drained: dict[str, list[Drained]] = defaultdict(list)
    known = {name: importlib.import_module(f"benchmarks.peers.{name}").PEER for name in peers.NAMES}
    for _ in range(bench.repeats):
        for name, workers in {**ONE_PROCESS, **TWO_PROCESSES, **FLOORS}.items():
            drained[name].append(drain(bench, workers))
        for name, peer in known.items():
            for setting in peer.settings:
                drained[f"{name}, {setting}"].append(_theirs(bench, name, peer, setting))
    one = _best(drained, ONE_PROCESS)
    two = _best(drained, TWO_PROCESSES)
    floor = _best(drained, FLOORS)
    best = {name: _best(drained, [f"{name}, {setting}" for setting in peer.settings]) for name, peer in known.items()}
    figures = [Figure(name=name, unit="workflows/s", values=_rates(all)) for name, all in drained.items()]
    figures += [
        _ratio(drained, one, floor, 0.4),
        _ratio(drained, two, floor, 0.55),
        _ratio(drained, one, best["dbos"], 90),
        _ratio(drained, one, best["absurd"], 30),
        _ratio(drained, one, best["pgqueuer"], 1),
        _ratio(drained, one, best["procrastinate"], None),
    ]
    for name in (one, two, floor, *best.values()):
        figures += [
            Figure(name=f"{name}: {label}", unit=unit, values=[getattr(each, part) for each in drained[name]],
                   better="less")
            for part, label, unit in (
                ("worker", "worker", "us/workflow"), ("server", "server", "us/workflow"),
                ("log", "log", "bytes/workflow"), ("commits", "commits", "/workflow"),
                ("statements", "statements", "/workflow"),
            )
        ]  # fmt: skip
    return figures


def _rates(drained: Sequence[Drained]) -> list[float]:
    return [one.rate for one in drained]


def _best(drained: Mapping[str, list[Drained]], names: Any) -> str:
    return max(names, key=lambda name: sorted(_rates(drained[name]))[len(drained[name]) // 2])


def _ratio(drained: Mapping[str, list[Drained]], ours: str, theirs: str, target: float | None) -> Figure:
    values = [one.rate / other.rate for one, other in zip(drained[ours], drained[theirs], strict=True)]
    return Figure(name=f"{ours} / {theirs}", unit="times", values=values, target=target)


def drain(bench: Bench, workers: Sequence[tuple[Any, ...]], *, backlog: int = COUNT, url: str | None = None) -> Drained:
    """By the workers, who reach the server by that URL, or by the floor: the tables are the same."""
    count, schema = bench.count(backlog), bench.fresh_schema()
    env = {DATABASE_URL: bench.cluster.url, SCHEMA: schema}
    run("starter", count, env=env)
    env[DATABASE_URL] = url or bench.cluster.url
    with bench.connect() as connection:
        # All workers are there before the first one begins.
        connection.execute(
            f"INSERT INTO {schema}.queue_rows (shard, name, paused, created_at) VALUES (1, 'default', true, now())"
        )
        drained = _drained(
            bench,
            connection,
            workers,
            count,
            left=f"SELECT count(*) FROM {schema}.queue_entries",
            drained=f"""
                SELECT extract(epoch FROM max(created_at) FILTER (WHERE kind = 'result')
                                          - min(started_at) FILTER (WHERE kind = 'result'))::float8,
                       LEAST(count(*) FILTER (WHERE kind = 'result'), count(*) FILTER (WHERE kind = 'step'))
                FROM {schema}.checkpoints
                WHERE status = 'success'
                """,
            go=f"UPDATE {schema}.queue_rows SET paused = false",
            env=env,
        )
        connection.execute(f"DROP SCHEMA {schema} CASCADE")
    return drained


def _theirs(bench: Bench, name: str, peer: Peer, setting: str) -> Drained:
    count, database = bench.count(peer.count), bench.fresh_database()
    given = conninfo_to_dict(database)
    # A socket's folder as a host, in the form that SQLAlchemy and asyncpg understand as well as libpq.
    url = f"postgresql://{given['user']}@/{given['dbname']}?host={given['host']}&port={given.get('port', 5432)}"
    run(f"peers.{name}", "start", url, setting, count)
    with bench.connect(database) as connection:
        workers = [(f"peers.{name}", "work", url, setting)]
        return _drained(bench, connection, workers, count, left=peer.left, drained=peer.drained, go=None, env={})


def _drained(
    bench: Bench,
    connection: Connection,
    workers: Sequence[tuple[Any, ...]],
    count: int,
    *,
    left: str,
    drained: str,
    go: str | None,
    env: Mapping[str, str],
) -> Drained:
    before = bench.written()
    server = bench.server_seconds()
    with ExitStack() as stack:
        processes = [stack.enter_context(role(*each, env=env)) for each in workers]
        own = sum(processor_seconds(each.pid) for each in processes)
        if go is not None:
            connection.execute(go.encode())
        _until_none_is_left(connection, left, processes)
        own = sum(processor_seconds(each.pid) for each in processes) - own
        server = bench.server_seconds() - server
    after = bench.written()
    ((seconds, ended),) = connection.execute(drained.encode()).fetchall()
    assert ended == count, f"{ended} of {count} are recorded, with their steps"
    return Drained(
        rate=count / seconds,
        worker=own / count * 1e6,
        server=server / count * 1e6,
        log=(after.log - before.log) / count,
        commits=(after.commits - before.commits) / count,
        statements=(after.statements - before.statements) / count,
    )


def _until_none_is_left(connection: Connection, left: str, workers: Sequence[Popen[str]]) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        ((count,),) = connection.execute(left.encode()).fetchall()
        if not count:
            return
        if any(worker.poll() is not None for worker in workers) or time.monotonic() > deadline:
            raise RuntimeError(f"the workers leave {count} undone")
        time.sleep(0.25)  # counting costs the server some milliseconds
