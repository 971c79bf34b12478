"""Claiming: takes pending workflows off the queues, as many as there are free slots, and keeps what is held true.

Polling is the truth: the claimer looks at every queue it serves once per interval, rarely while hints arrive (more so
where ten workers live), often where they don't (`Listener.hears`). A hint, a freed slot or a local start makes it look
earlier. A claim that came back full leaves its queue *hot*: there is more, and the next free slots go there without
asking which queues have work.

A claim is never sent again. When its answer is lost, the entries may be ours without our knowing: that is reconciled,
before the next claim, as it is when the database and this process disagree on how many entries are held (told by the
heartbeat, twice running): what the database says we hold and we don't know is released; what we run and it doesn't say
is ended. Claims and reconciliation are one task, so neither sees the other half-way. What is being started here
(claimed at its birth) counts as known from before its statement is sent.

Where many rows are dead and can't be removed, claims go on from where they have come to, and the heartbeat counts only
what is known here: so memory and database are compared every minute, and not by its count (bloat.py).

The history of a workflow that ran before (epoch > 1) is loaded in a second statement: the first one's snapshot is older
than its locks, and may miss what the former worker committed while the claim waited for it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from perdure import telemetry
from perdure.engine.bloat import Bloat, Front, Pace
from perdure.engine.executor import Executor, Release
from perdure.engine.leases import Lease
from perdure.engine.loop import Loop, Turns
from perdure.engine.writer import Writer
from perdure.model.records import Claim, Message, Recorded
from perdure.store.arrays import BigInts, Ints, Texts, Times, Uuids
from perdure.store.database import Database, Interrupted
from perdure.store.statements import SHARD

_POLL_SECONDS = 1.0
_COMPARE_SECONDS = 60.0
_DEAF_POLL_SECONDS = 0.1
_MOST_AT_ONCE = 500
_BATCHING_SECONDS = 0.004
_PARK_FROM = 1000
_NOT_MY_TURN_SECONDS = 0.01


class Claimer(Loop):
    """One task: claims, reconciles, and releases what runs have let go of."""

    name = "claimer"

    def __init__(
        self,
        database: Database,
        lease: Lease,
        executor: Executor,
        writer: Writer,
        *,
        queues: Sequence[str] | None,
        names: Sequence[str],
        version: str,
        only_versions: Sequence[str] | None,
        turns: Turns,
        bloat: Bloat,
        hears: Callable[[], bool],
        on_released: Callable[[set[str]], None],
    ) -> None:
        super().__init__(_POLL_SECONDS, turns=turns, is_shared=True)
        self._database = database
        self._lease = lease
        self._executor = executor
        self._writer = writer
        self._queues = tuple(queues) if queues is not None else None
        self._known = frozenset(names)
        self._names = Texts(names)
        self._version = version
        self._only_versions = None if only_versions is None else Texts(only_versions)
        self._bloat = bloat
        self._fronts: dict[str, Front] = {}
        self._pending = Pace(bloat)
        self._held = Pace(bloat)
        self._hears = hears
        self._on_released = on_released
        self._hot: dict[str, None] = {}
        self._hinted: dict[str, None] = {}
        self._registered: set[str] = set()
        self._releases: list[Release] = []
        self._reported: set[str] = set()
        self._reconcile = False
        self._disagreements = 0
        self._polled_at = 0.0
        self._compared_at = 0.0
        self._turns = itertools.count()
        self._stopping = False
        self._settled = asyncio.Event()

    # --- what others ask for ---------------------------------------------------------------------------------------

    def hint(self, queue: str) -> None:
        """Something is pending there, perhaps."""
        if self._queues is None or queue in self._queues:
            self._hinted[queue] = None
            if self._executor.free > 0:
                self.wake()

    def slot_freed(self) -> None:
        """A slot is free."""
        if self._hot or self._hinted:
            self.wake()

    def release(self, release: Release) -> None:
        """A workflow that this worker lets go of, as soon as what it recorded is written."""
        self._releases.append(release)
        self.wake()

    def beat(self, held: int) -> None:
        """The heartbeat counted this many entries of ours."""
        if self._bloat.is_heavy:
            since = asyncio.get_running_loop().time() - self._compared_at
            if since >= _COMPARE_SECONDS and self._held.is_due:
                self.doubt()
            return
        in_flight = self._writer.backlog + len(self._executor.reserved) + len(self._releases)
        if abs(held - self._executor.held) <= in_flight:
            self._disagreements = 0
            return
        self._disagreements += 1
        if self._disagreements > 1:
            self.doubt()

    @property
    def is_at_rest(self) -> bool:
        """Whether it has nothing to do but to poll, or no slot to do it for."""
        claims = (self._hot or self._hinted) and self._executor.free > 0
        return not (claims or self._releases or self._reconcile)

    def doubt(self) -> None:
        """Memory and database may disagree: reconcile before the next claim."""
        self._reconcile = True
        self.wake()

    def reserve(self, queue: str, name: str, id: UUID) -> bool:
        """Whether a workflow that starts now may be claimed at its birth: nothing that waits is overtaken."""
        allowed = (
            not self._stopping
            and self._lease.is_valid
            and name in self._known
            and (self._queues is None or queue in self._queues)
            and queue in self._registered
            and queue not in self._hot
            and queue not in self._hinted
            and self._executor.free > 0
        )
        if allowed:
            self._executor.reserve(id)
        return allowed

    def stop(self) -> None:
        """No more claims; what runs let go of is still released."""
        self._stopping = True

    async def settle(self) -> None:
        """Wait until everything that this worker let go of, or got and didn't begin, is pending again."""
        self._settled.clear()
        self.doubt()
        await self._settled.wait()

    # --- the one task ----------------------------------------------------------------------------------------------

    async def tick(self) -> float | None:
        if self._reconcile and self._lease.is_valid:
            await self._reconcile_now()
        elif self._stopping:
            self._reconcile = False  # nothing is held under a valid id; recovery has the rest
        if self._releases:
            await self._release_all()
        if not self._reconcile and not self._releases:
            self._settled.set()
        if self._stopping or not self._lease.is_valid:
            return None
        if self._hot or self._hinted:
            await self._claim_round()
        elif self.turns.is_taken:
            return _NOT_MY_TURN_SECONDS  # in which a hint is heard
        else:
            async with self.turns.turn():
                await self._claim_round()
        if (self._hot or self._hinted) and self._executor.free > 0:
            return 0.0  # a hint that came while a claim had all free slots in its hands woke nobody
        return None if self._hot or self._hears() else _DEAF_POLL_SECONDS

    async def _claim_round(self) -> None:
        """One look at each queue in which something may be pending; they share the free slots, and take turns."""
        await self._batched()
        queues = await self._candidates()
        first = next(self._turns) % len(queues) if queues else 0
        waiting = deque(queues[first:] + queues[:first])
        while waiting:
            free = self._executor.free
            if free <= 0 or self._stopping or not self._lease.is_valid:
                self._hinted.update(dict.fromkeys(waiting))  # their turn comes first
                return
            limit = min(-(-free // len(waiting)), _MOST_AT_ONCE)
            queue = waiting.popleft()
            self._hinted.pop(queue, None)
            try:
                claims = await self._claim(queue, limit)
            except BaseException:
                self._hinted.update(dict.fromkeys([queue, *waiting]))  # what was said of them is still true
                raise
            if len(claims) == limit:
                self._hot[queue] = None
            else:
                self._hot.pop(queue, None)

    async def _batched(self) -> None:
        """With a backlog, wait a moment for more slots: a claim of many costs as much as a claim of one."""
        executor = self._executor
        if self._hot and 0 < executor.free < min(_MOST_AT_ONCE, len(executor.runs)) // 2:
            await asyncio.sleep(_BATCHING_SECONDS)

    async def _candidates(self) -> list[str]:
        """The queues to look at now; asks the database where there is no better knowledge, and now and then anyway."""
        now = asyncio.get_running_loop().time()
        known = [*self._hinted, *(queue for queue in self._hot if queue not in self._hinted)]
        if known and now - self._polled_at < self.pause:
            return known
        self._polled_at = now
        if self._queues is not None:
            return list(self._queues)
        if not self._pending.is_due:
            return list(dict.fromkeys([*known, *self._fronts]))
        with self._pending.look():
            return [row.queue for row in await self._database.attempt("pending_queues", SHARD)]

    async def _claim(self, queue: str, limit: int) -> list[Claim]:
        if queue not in self._registered:
            await self._database.attempt("register_queue", SHARD, queue)
            self._registered.add(queue)
        worker_id = self._lease.worker_id
        assert worker_id is not None
        self._executor.claiming = limit
        try:
            rows = await self._taken(worker_id, queue, limit)
            if not rows:
                return []
            claims = await self._loaded(rows, worker_id)
            if worker_id != self._lease.worker_id:
                return []  # the lease was lost meanwhile: they are recovered like everything else
            if not self._stopping:
                self._executor.launch(claims)
                return claims
        except Interrupted:
            self.doubt()  # it may have taken effect
            raise
        finally:
            self._executor.claimed()
        for claim in claims:
            self.release(Release(workflow_id=claim.workflow_id, worker_id=worker_id, epoch=claim.epoch, stalls=0))
        return []

    async def _taken(self, worker_id: UUID, queue: str, limit: int) -> Sequence[Any]:
        """The rows of a claim, oldest first, from the front of the queue where that isn't too dear now."""
        front = self._fronts.setdefault(queue, Front(self._bloat))
        time = self._lease.time()
        claim = (SHARD, worker_id, queue, self._names, limit, self._only_versions, self._version)
        with front.look(time) as places:
            if places is None:
                rows = await self._database.attempt("claim", *claim)
            else:
                priorities, times, ids = places
                rows = await self._database.attempt("claim_further", *claim, Ints(priorities), Times(times), Uuids(ids))
        rows = sorted(rows, key=_place)
        front.came_to(rows, time, is_all=len(rows) < limit)
        if not rows and places is None:
            await self._look_for_unknown(queue)
        return rows

    async def _loaded(self, rows: Sequence[Any], worker_id: UUID) -> list[Claim]:
        """The claims, with the history of those that ran before."""
        again = [row.workflow_id for row in rows if row.epoch > 1 or row.wakes > 0]
        histories = await self._histories(again) if again else {}
        messages = await self._messages([row.workflow_id for row in rows if row.wakes > 0])
        return [
            Claim(
                workflow_id=row.workflow_id,
                name=row.name,
                worker_id=worker_id,
                epoch=row.epoch,
                input=row.input or "{}",
                started_at=row.started_at,
                recoveries=row.recoveries,
                stalls=row.stalls,
                wakes=row.wakes,
                deadline=row.deadline,
                parent_id=row.parent_id,
                history=histories.get(row.workflow_id, ()),
                messages=messages.get(row.workflow_id, ()),
            )
            for row in rows
        ]

    async def _messages(self, ids: list[UUID]) -> dict[UUID, tuple[Message, ...]]:
        if not ids:
            return {}
        rows = await self._database.attempt("messages", SHARD, Uuids(ids))
        return {
            id: tuple(Message(*row[1:]) for row in group)
            for id, group in itertools.groupby(rows, key=lambda row: row.workflow_id)
        }

    async def _histories(self, ids: list[UUID]) -> dict[UUID, tuple[Recorded, ...]]:
        rows = await self._database.attempt("load", SHARD, Uuids(ids))
        return {
            id: tuple(Recorded(*row[1:]) for row in group)
            for id, group in itertools.groupby(rows, key=lambda row: row.workflow_id)
        }

    # --- what nobody here can run ----------------------------------------------------------------------------------

    async def _look_for_unknown(self, queue: str) -> None:
        """A claim found nothing: is that because of names that this worker doesn't know? Many of them are parked."""
        rows = await self._database.attempt("unknown_names", SHARD, queue, self._names, _PARK_FROM)
        if not rows:
            return
        names = {row.name for row in rows}
        parked = sum(row.pending for row in rows) >= _PARK_FROM and await self._park(queue)
        if parked or not names <= self._reported:
            self._reported |= names
            telemetry.emit(telemetry.UnknownNames(queue=queue, names=tuple(sorted(names)), parked=parked))
        if parked:
            self.hint(queue)

    async def _park(self, queue: str) -> bool:
        """Move what nobody can run out of the way, batch by batch: a claim would walk over all of it each time."""
        parked = False
        while not self._stopping:
            rows = await self._database.attempt("park_unknown", SHARD, queue, _PARK_FROM)
            parked |= bool(rows)
            if sum(row.parked for row in rows) < _PARK_FROM:
                break
        return parked

    # --- keeping what is held true ---------------------------------------------------------------------------------

    async def _reconcile_now(self) -> None:
        """Compare what the database says we hold with what we run."""
        worker_id = self._lease.worker_id
        assert worker_id is not None
        executor = self._executor
        before = {id: run for id, run in executor.runs.items() if not run.over and run.worker_id == worker_id}
        self._compared_at = asyncio.get_running_loop().time()
        with self._held.look():
            rows = await self._database.attempt("held", SHARD, worker_id)
        held = {row.workflow_id: row.epoch for row in rows}
        leaving = {release.workflow_id for release in self._releases}
        unknown = {
            id: epoch
            for id, epoch in held.items()
            if id not in executor.reserved
            and id not in leaving
            and ((run := executor.runs.get(id)) is None or run.epoch != epoch)
        }
        gone = [id for id, run in before.items() if not run.over and held.get(id) != run.epoch]
        released: Sequence[Any] = ()
        if unknown:  # some of them may have ended in this moment: those it doesn't find
            released = await self._database.attempt(
                "release", SHARD, worker_id, Uuids(unknown), BigInts(unknown.values()), 0
            )
            self._on_released({row.queue for row in released})
            for row in released:
                self.hint(row.queue)
        dropped = executor.drop(gone, "the database says that this worker doesn't hold it")
        if released or dropped:
            telemetry.emit(telemetry.Reconciled(worker_id=worker_id, released=len(released), dropped=dropped))
        self._reconcile = False
        self._disagreements = 0

    async def _release_all(self) -> None:
        """Make what runs let go of pending again, behind everything that they recorded."""
        if self._executor.draining:
            await self._writer.drained()
        releases = self._releases
        groups: dict[tuple[UUID, int], list[Release]] = {}
        for release in releases:
            groups.setdefault((release.worker_id, release.stalls), []).append(release)
        queues: set[str] = set()
        for (worker_id, stalls), group in groups.items():
            rows = await self._database.attempt(
                "release", SHARD, worker_id, Uuids(release.workflow_id for release in group),
                BigInts(release.epoch for release in group), stalls,
            )  # fmt: skip
            queues |= {row.queue for row in rows}
        self._releases = self._releases[len(releases) :]
        self._on_released(queues)
        for queue in queues:
            self.hint(queue)


def _place(row: Any) -> tuple[int, datetime, int]:
    return (-row.priority, row.enqueued_at, row.workflow_id.int)
