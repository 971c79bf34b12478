"""The server on which everything runs, and how much is to be run."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from benchmarks.processes import processor_seconds
from perdure import embedded
from perdure.embedded import Cluster

DURABLE = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}
# Not PostgreSQL's default of 128 MB, which nobody runs in production; a checkpoint shouldn't fall into one repetition
# of three. The same server serves the peer.
SETTINGS = {
    **DURABLE,
    "shared_buffers": "1GB",
    "max_wal_size": "8GB",
    "max_connections": "300",
    "shared_preload_libraries": "pg_stat_statements",
}

Connection = psycopg.Connection[tuple[Any, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """Sums since the server began; what sessions that still live have done in the last second may be missing.

    Attributes:
        log: Bytes of its log.
        commits: Transactions.
        statements: Statements, and so round trips.
    """

    log: int
    commits: int
    statements: int


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every measurement gets.

    Attributes:
        cluster: The server.
        repeats: How often everything is measured.
        quick: Small counts, to see whether it runs: no figure to quote.
        seconds: How long what ages is watched.
    """

    cluster: Cluster
    repeats: int
    quick: bool
    seconds: float = 60.0
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def count(self, usual: int) -> int:
        """How many of something; a tenth of that if it is to be quick."""
        return max(1, usual // 10) if self.quick else usual

    def fresh_schema(self) -> str:
        """The name of a schema that nobody has used: every repetition begins with empty tables."""
        return f"bench_{next(self._numbers)}"

    def fresh_database(self) -> str:
        """The URL of a new and empty database."""
        name = f"peer_{next(self._numbers)}"
        with self.connect() as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return make_conninfo(self.cluster.url, dbname=name)

    def connect(self, url: str | None = None) -> Connection:
        """A connection for looking on."""
        return psycopg.connect(url or self.cluster.url, autocommit=True, application_name="benchmarks")

    def written(self) -> Written:
        """What the server has written and done so far."""
        with self.connect() as connection:
            ((log, commits, statements),) = connection.execute(
                """
                SELECT pg_current_wal_lsn() - '0/0',
                       (SELECT sum(xact_commit) FROM pg_stat_database),
                       (SELECT sum(calls) FROM pg_stat_statements)
                """
            ).fetchall()
        return Written(log=int(log), commits=int(commits), statements=int(statements))

    def server_seconds(self) -> float:
        """How much processor time all processes of the server have taken so far, those that ended included."""
        pid = self.cluster.status().pid
        assert pid is not None
        return processor_seconds(pid, family=True)


@contextmanager
def server() -> Generator[Cluster]:
    """A server of its own, with durable settings: checked, not believed."""
    with embedded.temporary(SETTINGS) as cluster:
        with psycopg.connect(cluster.url) as connection:
            connection.execute("CREATE EXTENSION pg_stat_statements")
            for name, wanted in DURABLE.items():
                row = connection.execute(f"SHOW {name}".encode()).fetchone()
                assert row == (wanted,), f"{name} is {row}, so nothing that is measured here would be durable"
                print(f"SHOW {name}: {wanted}")
        print(f"one 8 kB fdatasync: {sync_milliseconds(cluster.directory):.2f} ms; {os.cpu_count()} processors")
        yield cluster


def sync_milliseconds(folder: Path) -> float:
    """What a commit waits for: on a disk that lies, or in memory, this is nothing."""
    path, times = folder / "fdatasync", []
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        for _ in range(50):
            os.pwrite(file, os.urandom(8192), 0)
            began = time.perf_counter()
            os.fdatasync(file)
            times.append(time.perf_counter() - began)
    finally:
        os.close(file)
        path.unlink()
    return sorted(times)[len(times) // 2] * 1000
