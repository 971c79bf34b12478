"""Workers and clients on a server that is attacked at random; and the books at the end.

What is hit, and how: worker processes get SIGKILL, SIGTERM, or SIGSTOP for longer than their lease and then SIGCONT;
the server is crashed and started again, and throws sessions out; the way to it (a TCP proxy) is cut, slow, or swallows
all there is for a while. The seed gives the order of the faults, not their effect: processes run as they like.

Nobody is told: workers are restarted when they are gone, as a supervisor would. At the end all faults stop, everything
that was started must come to its end, and the books must balance.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Self
from uuid import UUID

import psycopg

from chaos import bank
from crash.proxy import Proxy
from perdure import Client, DatabaseUnavailable, Invocation
from perdure.config import Settings
from perdure.doctor import Level, examine
from perdure.embedded import Cluster

LEASE = 3.0
_TESTS = Path(__file__).resolve().parents[1]
_SAMPLE_SECONDS = 0.25
_MOST_OPEN = 400
_CHILDREN = 4
_SETTLES_SECONDS = 180.0


@dataclass(slots=True)
class Fault:
    """Something that was done.

    Attributes:
        at: When, in seconds since the storm began.
        kind: What.
        recovered: How long it took until a workflow came to its end after that, in seconds; None: none did.
    """

    at: float
    kind: str
    recovered: float | None = None


@dataclass(slots=True)
class Report:
    """What happened, and what was found."""

    seed: int
    seconds: float
    faults: list[Fault] = field(default_factory=list[Fault])
    samples: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    """When, and how many workflows had ended by then."""
    acknowledged: int = 0
    unavailable: int = 0
    """Starts that gave up, and were tried again under their key."""
    settled_in: float = 0.0
    """How long it took, after the last fault, until everything had ended."""
    ended: dict[str, int] = field(default_factory=dict[str, int])
    reruns: int = 0
    """Plain steps that ran once more."""
    wrong: list[str] = field(default_factory=list[str])

    @property
    def counts(self) -> Counter[str]:
        """How often each fault was made."""
        return Counter(fault.kind for fault in self.faults)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"counts": dict(self.counts)}


class Worker:
    """A `perdure worker`, started again whenever it is gone."""

    def __init__(self, url: str, log: Path) -> None:
        self._command = [
            sys.executable, "-m", "perdure.cli", "worker", "chaos.bank:app", "--concurrency", "60",
            "--lease", f"{LEASE}s", "--grace", "2s",
        ]  # fmt: skip
        self._env = {**os.environ, bank.URL: url, "PYTHONPATH": str(_TESTS)}
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    def ensure(self) -> None:
        """Start it, if it doesn't run."""
        if self._process is None or self._process.poll() is not None:
            with self._log.open("ab") as log:
                self.starts += 1
                self._process = subprocess.Popen(self._command, env=self._env, stdout=log, stderr=log)

    def send(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    async def terminate(self, seconds: float) -> bool:
        """SIGTERM; returns whether it ended within so many seconds."""
        process = self._process  # another one will be in its place at once
        assert process is not None
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(process.wait, seconds)
        return process.poll() is not None

    def end(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait(10)


class Storm:
    """One run of it.

    Args:
        cluster: The server; it listens on TCP.
        seconds: For how long faults are made.
        seed: Gives the order of the faults.
        folder: Where the workers' logs go.
        workers: How many worker processes there are.
        rate: How many workflows are started a second.
    """

    def __init__(
        self, cluster: Cluster, *, seconds: float, seed: int, folder: Path, workers: int = 3, rate: float = 20.0
    ) -> None:
        self._cluster = cluster
        self._random = random.Random(seed)
        self._trades = random.Random(seed)  # its own: how often it is asked depends on the time
        self._rate = rate
        self._proxy = Proxy(cluster.port)
        self._folder = folder
        self._count = workers
        self.workers: list[Worker] = []
        self._began = 0.0
        self._started: dict[UUID, str] = {}
        self._ended = 0
        self._is_over = False
        self.report = Report(seed=seed, seconds=seconds)

    async def run(self) -> Report:
        """All of it, to the books."""
        async with self:
            self._began = time.monotonic()
            background = [asyncio.ensure_future(each) for each in (self._supervise(), self._sample(), self._trade())]
            try:
                while self._now < self.report.seconds:
                    await self._attack()
                    await asyncio.sleep(self._random.uniform(0.5, 2.5))
                self._is_over = True
                await background[2]
                await self._settle()
            finally:
                for task in background:
                    task.cancel()
                await asyncio.gather(*background, return_exceptions=True)
            await self._audit()
        return self.report

    async def __aenter__(self) -> Self:
        self._proxy.__enter__()
        with psycopg.connect(self.direct, autocommit=True) as connection:
            connection.execute(bank.LEDGER.encode())
        async with Client(self.direct, schema=bank.SCHEMA) as client:
            await client.session().database.fetch("clock")
        for number in range(self._count):
            worker = Worker(self.url, self._folder / f"worker-{number}.log")
            worker.ensure()
            self.workers.append(worker)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for worker in self.workers:
            worker.end()
        self._proxy.__exit__()

    @property
    def url(self) -> str:
        """Where workers and clients go."""
        return self._proxy.url()

    @property
    def direct(self) -> str:
        """Where the books are read: nothing is in that way."""
        return self._cluster.url

    @property
    def _now(self) -> float:
        return time.monotonic() - self._began

    # --- what goes on meanwhile ------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        while True:
            await asyncio.sleep(0.3)
            for worker in self.workers:
                worker.ensure()

    async def _sample(self) -> None:
        """Count what has ended, past the proxy; while the server is away there is nothing to count."""
        while True:
            with contextlib.suppress(psycopg.Error):
                async with await psycopg.AsyncConnection.connect(self.direct, autocommit=True) as connection:
                    while True:
                        cursor = await connection.execute(
                            f"SELECT count(*) FROM {bank.SCHEMA}.checkpoints WHERE key = '$result'".encode()
                        )
                        (count,) = await cursor.fetchone() or (0,)
                        self._seen(count)
                        await asyncio.sleep(_SAMPLE_SECONDS)
            await asyncio.sleep(_SAMPLE_SECONDS)

    def _seen(self, ended: int) -> None:
        if ended > self._ended:
            for fault in self.report.faults:
                if fault.recovered is None:
                    fault.recovered = round(self._now - fault.at, 2)
        self._ended = ended
        self.report.samples.append((round(self._now, 2), ended))

    async def _trade(self) -> None:
        """Start workflows through the proxy, each under a key, until that is acknowledged."""
        async with Client(self.url, schema=bank.SCHEMA, connect_timeout=timedelta(seconds=2)) as client:
            number = 0
            while not self._is_over:
                if len(self._started) - self._ended < _MOST_OPEN:
                    number += 1
                    await self._start(client, number)
                await asyncio.sleep(self._trades.expovariate(self._rate))

    async def _start(self, client: Client, number: int) -> None:
        what = self._trades.choices(("transfer", "batch", "trip"), (6, 1, 3))[0]
        arguments = {
            "transfer": (1 + number % bank.ACCOUNTS, 1 + (number * 13) % bank.ACCOUNTS, number % 90 + 1),
            "batch": (number, _CHILDREN),
            "trip": (number,),
        }[what]
        while True:
            try:
                handle = await client.start(Invocation(what, *arguments), key=f"{number}")
            except DatabaseUnavailable:
                self.report.unavailable += 1
            else:
                self._started[handle.id] = what
                self.report.acknowledged += 1
                return

    # --- faults ----------------------------------------------------------------------------------------------------

    async def _attack(self) -> None:
        worker = self._random.choice(self.workers)
        kind, do = self._random.choice(
            (
                ("SIGKILL", lambda: self._kill(worker)),
                ("SIGKILL", lambda: self._kill(worker)),
                ("SIGSTOP", lambda: self._freeze(worker)),
                ("SIGTERM", lambda: self._terminate(worker)),
                ("server crash", self._crash_server),
                ("sessions thrown out", self._throw_out),
                ("connections cut", self._cut),
                ("connections cut", self._cut),
                ("black hole", self._swallow),
                ("slow connections", self._slow_down),
            )
        )
        self.report.faults.append(Fault(round(self._now, 2), kind))
        await do()

    async def _kill(self, worker: Worker) -> None:
        worker.send(signal.SIGKILL)

    async def _freeze(self, worker: Worker) -> None:
        """For longer than the lease: others take its work over, and then it goes on where it stood."""
        worker.send(signal.SIGSTOP)
        await asyncio.sleep(LEASE * self._random.uniform(1.2, 2.0))
        worker.send(signal.SIGCONT)

    async def _terminate(self, worker: Worker) -> None:
        if not await worker.terminate(20):
            self.report.wrong.append("a worker didn't end within 20 s after SIGTERM")
            worker.send(signal.SIGKILL)

    async def _crash_server(self) -> None:
        await asyncio.to_thread(self._cluster.restart, mode="immediate")

    async def _throw_out(self) -> None:
        with contextlib.suppress(psycopg.Error):
            async with await psycopg.AsyncConnection.connect(self.direct, autocommit=True) as connection:
                await connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND random() < 0.5"
                )

    async def _cut(self) -> None:
        self._proxy.cut()

    async def _slow_down(self) -> None:
        self._proxy.latency = self._random.uniform(0.05, 0.3)
        await asyncio.sleep(self._random.uniform(1, 4))
        self._proxy.latency = 0.0

    async def _swallow(self) -> None:
        self._proxy.is_silent = True
        await asyncio.sleep(self._random.uniform(0.5, 2 * LEASE))
        self._proxy.speak()

    # --- the end ---------------------------------------------------------------------------------------------------

    async def _settle(self) -> None:
        """Everything that was started comes to its end."""
        began = time.monotonic()
        left = -1
        while time.monotonic() - began < _SETTLES_SECONDS:
            async with await psycopg.AsyncConnection.connect(self.direct, autocommit=True) as connection:
                cursor = await connection.execute(
                    f"SELECT (SELECT count(*) FROM {bank.SCHEMA}.queue_entries) "
                    f"+ (SELECT count(*) FROM {bank.SCHEMA}.waits)".encode()
                )
                (left,) = await cursor.fetchone() or (0,)
            if left == 0:
                self.report.settled_in = round(time.monotonic() - began, 2)
                return
            await asyncio.sleep(_SAMPLE_SECONDS)
        self.report.wrong.append(f"{left} workflows haven't ended {_SETTLES_SECONDS:.0f} s after the last fault")

    async def _audit(self) -> None:
        wrong = self.report.wrong
        with psycopg.connect(self.direct, autocommit=True) as connection:

            def rows(sql: str) -> list[tuple[Any, ...]]:
                return connection.execute(sql.replace("$", bank.SCHEMA).encode()).fetchall()

            status = {id: (name, how) for id, name, how in rows("SELECT id, name, status FROM $.workflows")}
            self.report.ended = dict(Counter(f"{name}: {how}" for name, how in status.values()))
            wrong += [f"acknowledged {what} {id} isn't there" for id, what in self._started.items() if id not in status]
            may = {"trip": {"success", "error"}}
            wrong += [
                f"{name} {id} ended in {how}"
                for id, (name, how) in status.items()
                if how not in may.get(name, {"success"})
            ]
            wrong += [
                f"trip {id} failed with {error}"
                for id, error in rows("SELECT id, error FROM $.workflows WHERE name = 'trip' AND status = 'error'")
                if "NoSeat" not in str(error)
            ]
            wrong += [
                f"booked {count} times: {key} of {id}"
                for id, key, count in rows(
                    "SELECT workflow_id, key, count(*) FROM ledger.entries GROUP BY 1, 2 HAVING count(*) > 1"
                )
            ]
            wrong += [
                f"{name} {id} has {count} entries, which sum up to {cents}"
                for id, name, count, cents in rows(
                    "SELECT id, name, count(entries), coalesce(sum(cents), 0) FROM $.workflows "
                    "LEFT JOIN ledger.entries ON workflow_id = id WHERE name IN ('transfer', 'trip') GROUP BY 1, 2"
                )
                if (count, cents) != (2, 0)
            ]
            ((balance,),) = rows("SELECT sum(balance) FROM ledger.accounts")
            ((booked,),) = rows("SELECT coalesce(sum(cents), 0) FROM ledger.entries")
            if balance or booked:
                wrong.append(f"the accounts sum up to {balance}, the entries to {booked}")
            wrong += [
                f"accounts that differ from their entries: {found}"
                for found in rows(
                    "SELECT id, balance, (SELECT coalesce(sum(cents), 0) FROM ledger.entries WHERE account = id) "
                    "FROM ledger.accounts WHERE balance <> "
                    "(SELECT coalesce(sum(cents), 0) FROM ledger.entries WHERE account = id)"
                )
            ]
            expected = {"moved": sum(range(1, _CHILDREN + 1)), "received": list(range(bank.RECEIPTS))}
            wrong += [
                f"batch {id} returned {output}"
                for id, output in rows("SELECT id, output FROM $.workflows WHERE name = 'batch' AND status = 'success'")
                if output != expected
            ]
            wrong += [
                f"a plain step of {id} never ran: {key}"
                for id, key in rows(
                    "SELECT step.workflow_id, step.key FROM $.workflow_steps AS step WHERE step.name = 'tell' "
                    "AND NOT EXISTS (SELECT 1 FROM ledger.effects WHERE effects.workflow_id = step.workflow_id)"
                )
            ]
            ((self.report.reruns,),) = rows(
                "SELECT coalesce(sum(count - 1), 0)::int FROM "
                "(SELECT count(*) FROM ledger.effects GROUP BY workflow_id, key) AS counted"
            )
        settings = Settings(database_url=self.direct, schema=bank.SCHEMA, migrate=False, read_only=True)
        for finding in await examine(settings):
            if finding.level is Level.PROBLEM and finding.check in ("schema", "stuck", "queues", "names"):
                wrong.append(f"the doctor says: {finding.text}")
