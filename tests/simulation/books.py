"""The books of a seed: what must hold at any time, and at its end."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from uuid import UUID

import psycopg
from psycopg.rows import namedtuple_row

from perdure import telemetry
from perdure.handle import Handle
from perdure.worker import Worker
from simulation.loop import Loop, Process
from simulation.seen import EPOCH_SECONDS, LEASE, Seen
from simulation.world import Broken, World

TABLES = (
    "workflow_rows", "checkpoints", "queue_entries", "waits", "outbox", "message_rows", "event_rows", "event_waits",
    "stream_rows", "stream_parts", "deadlines", "queue_rows", "worker_rows", "running_steps", "ledger",
)  # fmt: skip


class Books:
    """Looks at the database beside all others, and knows what happened to whom."""

    def __init__(self, url: str, loop: Loop, seen: Seen) -> None:
        self.oracle = psycopg.connect(url, autocommit=True, row_factory=namedtuple_row)
        self.loop = loop
        self.seen = seen
        self.world = World(self.is_durable, loop.time)
        self.acknowledged: set[UUID] = set()
        self.old: set[UUID] = set()
        """What had begun before a tail was lost: of these only the end counts."""
        self.lost: set[str] = set()
        """Outcomes that were in that tail: who has got them still stands on them."""
        self.troubles: list[tuple[str, float, float]] = []
        """(process, from, to): when it can't be expected to be heard."""
        self.frozen: list[tuple[str, float, float]] = []
        self.is_calm = self.loses_tail = self.sets_clock = False

    # --- what happened ---------------------------------------------------------------------------------------------

    def trouble(self, process: str, seconds: float) -> None:
        """That process won't be heard for so long."""
        now = self.loop.time()
        self.troubles.append((process, now, now + seconds))

    def _was_troubled(self, process: str, since: float, until: float) -> bool:
        return any(who == process and begun <= until and ended >= since for who, begun, ended in self.troubles)

    # --- at any time -----------------------------------------------------------------------------------------------

    def is_durable(self, id: UUID, tokens: tuple[str, ...]) -> bool:
        """Whether these outcomes are there, for anybody."""
        payloads = {f'"{token}"' for token in tokens} - self.lost
        row = self.oracle.execute(
            "SELECT count(*) FROM perdure.checkpoints WHERE workflow_id = %s AND payload::text = ANY (%s)",
            (id, list(payloads)),
        ).fetchone()
        assert row is not None
        return bool(row[0] >= len(payloads))

    def has_result(self, id: UUID) -> bool:
        """Whether it has ended, for anybody."""
        return (
            self.oracle.execute(
                "SELECT FROM perdure.checkpoints WHERE workflow_id = %s AND key = '$result'", (id,)
            ).rowcount
            > 0
        )

    def was_asked_of_all(self, parent: UUID) -> bool:
        """Whether all children of that workflow have ended, or were asked to."""
        return not self.oracle.execute(
            "SELECT FROM perdure.workflow_rows AS child WHERE child.parent_id = %s AND NOT EXISTS ("
            "SELECT FROM perdure.checkpoints AS sign "
            "WHERE sign.workflow_id = child.id AND sign.key IN ('$cancel', '$result'))",
            (parent,),
        ).rowcount

    def expect(self, handle: Handle[Any], path: list[str], names: Sequence[str] | None, count: int = -1) -> None:
        """It ended with these outcomes; and all that it did stood on what it ended with."""
        given = [each.partition(":")[0] for each in path]
        if (names is not None and given != list(names)) or (names is None and len(given) != count):
            raise Broken(f"{handle.id} ended with {path}; expected {names or count}")
        for effect in self.world.effects:
            if effect.workflow_id == handle.id and list(effect.base) != path[: len(effect.base)]:
                raise Broken(
                    f"effect {effect.token} of {handle.id} stood on {effect.base}, and the workflow ended with {path}"
                )
        if len(set(path)) != len(path):
            raise Broken(f"{handle.id} got an outcome twice: {path}")

    async def watch(self, workers: Callable[[], Iterable[tuple[Process, Worker]]]) -> None:
        """Look again and again at what must always hold."""
        while True:
            await asyncio.sleep(0.25)
            self.check_rows()
            self._check_leases(workers())

    def _check_leases(self, workers: Iterable[tuple[Process, Worker]]) -> None:
        """No worker believes in a lease that has run out; and no run outlives the lease of its worker."""
        if self.loses_tail or self.sets_clock:
            return  # nobody can know at once
        for process, worker in workers:
            name = process.name
            if process.is_frozen or not worker._lease.is_valid:
                continue
            row = self.oracle.execute(
                "SELECT status, date_part('epoch', expires_at) AS expires_at FROM perdure.worker_rows WHERE id = %s",
                (worker._lease.worker_id,),
            ).fetchone()
            now = EPOCH_SECONDS + self.loop.time()
            if row is None or row.status != "live" or row.expires_at < now - 0.001:
                self.world.complaints.append(f"{name} believes in a lease that has run out: {row}, at {now}")
            for held in worker.executor.runs.values():
                if held.worker_id != worker._lease.worker_id:
                    self.world.complaints.append(f"a run of {name} has outlived its lease")

    def check_rows(self) -> None:
        """What must hold between any two transactions."""
        for what, query in _INVARIANTS.items():
            rows = self.oracle.execute(query).fetchall()
            if rows:
                self.world.complaints.append(f"{what}: {rows[:3]}")

    def left(self) -> str:
        """What is left to do, for a message."""
        rows = self.oracle.execute(
            "SELECT 'entry' AS kind, workflow_id, name, worker_id::text, epoch, wakes FROM perdure.queue_entries "
            "UNION ALL SELECT 'wait', workflow_id, name, waiting_for, epoch, wakes FROM perdure.waits"
        ).fetchall()
        return "; ".join(" ".join(map(str, row)) for row in rows) or "nothing is left in the database"

    def clean(self) -> None:
        """Nothing has happened yet."""
        self.oracle.execute("; ".join(f"DELETE FROM perdure.{table}" for table in TABLES))
        self.oracle.execute("UPDATE perdure.maintenance SET next_at = 'epoch'")

    # --- the standby -----------------------------------------------------------------------------------------------

    def copy(self) -> None:
        """A standby has got all that is committed now."""
        with self.oracle.transaction():
            self.oracle.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            self._copy("perdure", "standby")

    def promote(self) -> None:
        """The standby is the server now; what it hasn't got is gone."""
        before = self._outcomes()
        with self.oracle.transaction():
            self._copy("standby", "perdure")
        self.lost = before - self._outcomes()
        self.acknowledged.clear()
        self.world.effects.clear()
        self.old = {row.id for row in self.oracle.execute("SELECT id FROM perdure.workflow_rows")}

    def _outcomes(self) -> set[str]:
        return {row.payload for row in self.oracle.execute("SELECT payload::text FROM perdure.checkpoints")}

    def _copy(self, source: str, target: str) -> None:
        for table in TABLES:
            self.oracle.execute(f"DELETE FROM {target}.{table}")
            self.oracle.execute(f"INSERT INTO {target}.{table} SELECT * FROM {source}.{table}")

    # --- at the end ------------------------------------------------------------------------------------------------

    async def rest(self) -> None:
        """Wait until nothing is left to do."""
        while True:
            left = self.oracle.execute(
                "SELECT (SELECT count(*) FROM perdure.queue_entries) AS entries, "
                "(SELECT count(*) FROM perdure.waits) AS waits, (SELECT count(*) FROM perdure.outbox) AS notes"
            ).fetchone()
            assert left is not None
            if not any(left):
                return
            if self.loses_tail and not left.entries and not left.notes:
                waits = self.oracle.execute("SELECT workflow_id, waiting_for FROM perdure.waits").fetchall()
                if all(row.workflow_id in self.old and row.waiting_for == "message" for row in waits):
                    return  # for who is gone
            await asyncio.sleep(0.5)

    def close(self) -> None:
        """Look at everything once more.

        Raises:
            Broken: Something doesn't hold.
        """
        self.check_rows()
        if self.world.complaints:
            raise Broken(self.world.complaints[0])
        self._check_acknowledged()
        self._check_loads()
        self._check_zombies()
        self._check_burials()
        self._check_calm()

    def _check_acknowledged(self) -> None:
        for id in self.acknowledged:
            if not self.has_result(id):
                raise Broken(f"{id} was started, and has no result")

    def _check_loads(self) -> None:
        """A run knows all that runs before it have recorded: nothing of an old epoch commits behind its load."""
        if self.loses_tail:
            return
        loads: dict[tuple[str, UUID], set[str]] = {}
        statements = iter(self.seen.statements)
        statement = next(statements, None)
        for at, process, event in self.seen.events:
            if not isinstance(event, telemetry.WorkflowClaimed) or event.epoch == 1:
                continue
            while statement is not None and statement[0] <= at:
                _, who, name, params, rows = statement
                if name == "load" and not isinstance(rows, BaseException):
                    loads |= {(who, id): {row.key for row in rows if row.workflow_id == id} for id in params[1]}
                statement = next(statements, None)
            for row in self.oracle.execute(
                "SELECT key, epoch FROM perdure.checkpoints WHERE workflow_id = %s AND epoch < %s "
                "AND worker_id IS NOT NULL AND kind NOT IN ('history', 'runs')",
                (event.workflow_id, event.epoch),
            ):
                if row.key not in loads[process, event.workflow_id]:
                    raise Broken(
                        f"{row.key!r} of {event.workflow_id} was recorded in epoch {row.epoch}, and the run of epoch "
                        f"{event.epoch} didn't know it"
                    )

    def _owners(self) -> dict[UUID, str]:
        """Which process has had which worker id."""
        return {
            params[1]: who.partition(".")[0]
            for _, who, name, params, _ in self.seen.statements
            if name == "register_worker"
        }

    def _check_zombies(self) -> None:
        """A worker that could have known that it was given up begins nothing more."""
        owners = self._owners()
        claimed: dict[tuple[str, UUID], float] = {}
        recovered: dict[tuple[str, UUID], float] = {}
        for at, who, event in self.seen.events:
            if isinstance(event, telemetry.WorkflowClaimed):
                claimed[who, event.workflow_id] = at
            elif isinstance(event, telemetry.WorkflowsRecovered):
                recovered |= {(owners[event.worker_id], id): at for id in event.workflows}
        if self.loses_tail or self.sets_clock:
            return
        for effect in self.world.effects:
            gone = recovered.get((effect.process, effect.workflow_id))
            if gone is None or effect.at <= gone or claimed.get((effect.process, effect.workflow_id), 0.0) >= gone:
                continue
            if not any(who == effect.process and end >= gone - LEASE for who, _, end in self.frozen):
                raise Broken(
                    f"{effect.token} of {effect.workflow_id} began {effect.at - gone:.3f} s after it was recovered"
                )

    def _check_burials(self) -> None:
        """Nobody is buried for what happened to all."""
        if self.loses_tail or self.sets_clock:
            return
        owners = self._owners()
        for at, _, event in self.seen.events:
            if isinstance(event, telemetry.WorkerBuried):
                victim = owners[event.worker_id]
                if not self._was_troubled(victim, at - 3 * LEASE, at):
                    raise Broken(f"{victim} was buried at {at:.3f} s, and nothing had happened to it alone")

    def _check_calm(self) -> None:
        """Where nothing went wrong, no body runs twice."""
        if not self.is_calm:
            return
        times = Counter((each.workflow_id, each.name, each.attempt) for each in self.world.effects)
        may = {"capricious", "fragile"}  # their failure isn't the end of them
        if again := [each for each, count in times.items() if count > 1 and each[1] not in may]:
            raise Broken(f"without any fault, a body ran again: {again}")


_INVARIANTS = {
    "a workflow is both pending and waiting": (
        "SELECT workflow_id FROM perdure.queue_entries JOIN perdure.waits USING (shard, workflow_id)"
    ),
    "an ended workflow has an entry": (
        "SELECT workflow_id FROM perdure.queue_entries AS entry JOIN perdure.checkpoints AS result "
        "USING (shard, workflow_id) WHERE result.key = '$result'"
    ),
    "what a transaction wrote and its checkpoint aren't one": (
        "SELECT ledger.token, step.key FROM perdure.ledger FULL JOIN (SELECT workflow_id, key, payload "
        "FROM perdure.checkpoints WHERE kind = 'step' AND (key = 'pay' OR key LIKE 'pay#%')) AS step "
        "ON step.workflow_id = ledger.workflow_id AND step.payload::text = '\"' || ledger.token || '\"' "
        "WHERE ledger.token IS NULL OR step.key IS NULL"
    ),
    "a workflow was lost": (
        "SELECT id FROM perdure.workflow_rows AS row WHERE NOT EXISTS (SELECT FROM perdure.queue_entries AS entry "
        "WHERE entry.workflow_id = row.id) AND NOT EXISTS (SELECT FROM perdure.waits WHERE waits.workflow_id = row.id) "
        "AND NOT EXISTS (SELECT FROM perdure.checkpoints AS result WHERE result.workflow_id = row.id "
        "AND result.key = '$result')"
    ),
}
