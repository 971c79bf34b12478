"""The runs of a worker: begins them, counts them, and knows what becomes of each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg

from perdure import failures, telemetry
from perdure.authoring.workflows import Workflow
from perdure.codec import Codec
from perdure.engine.alarms import Alarms
from perdure.engine.calls import Transactions
from perdure.engine.children import Ended
from perdure.engine.ports import Exchange
from perdure.engine.run import Run
from perdure.engine.threads import Threads
from perdure.engine.writer import Writer
from perdure.errors import ConfigurationError, DatabaseUnavailable, RecoveryLimitExceeded
from perdure.failures import Catalogue
from perdure.model.records import Claim
from perdure.store.pauses import backoff

_MOST_RESTING = 10
_PASSING = (DatabaseUnavailable, ConfigurationError, psycopg.Error)
"""What is tried again, for as long as the lease lasts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A workflow that is to be pending again. `stalls`: 1 if that counts as a recovery without progress."""

    workflow_id: UUID
    worker_id: UUID
    epoch: int
    stalls: int


class Executor:
    """Runs what was claimed, at most `concurrency` at a time."""

    def __init__(
        self,
        *,
        workflows: Mapping[str, Workflow[..., Any]],
        writer: Writer,
        alarms: Alarms,
        threads: Threads,
        transactions: Transactions,
        catalogue: Catalogue,
        codec: Codec | None,
        max_payload: int,
        max_recoveries: int,
        version: str,
        suspends_from: float,
        concurrency: int,
        time: Callable[[], datetime],
        exchange: Exchange,
        settings: object,
        on_child_ended: Callable[[bool], None],
        on_pending: Callable[[set[str]], None],
        on_children_wanted: Callable[[UUID], None],
        on_slot: Callable[[], None],
        on_result: Callable[[UUID, str, str], None],
        on_release: Callable[[Release], None],
        on_awoken: Callable[[UUID], None],
        on_timer: Callable[[], None],
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.alarms = alarms
        self.version = version
        self.suspends_from = suspends_from
        """A run stays in memory for waits that are no longer than so many seconds."""
        self.writer = writer
        self.threads = threads
        self.transactions = transactions
        self.catalogue = catalogue
        self.codec = codec
        self.max_payload = max_payload
        self.draining = False
        self.runs: dict[UUID, Run] = {}
        """What this worker holds, as far as it knows: running, or its result being written."""
        self.reserved: set[UUID] = set()
        """What is being started here, claimed already."""
        self.claiming = 0
        """How many may come back with the claim that is under way; see `claimed`."""
        self._workflows = workflows
        self._max_recoveries = max_recoveries
        self._concurrency = concurrency
        self._time = time
        self.exchange = exchange
        self._settings = settings
        self._on_child_ended = on_child_ended
        self._on_pending = on_pending
        self._on_children_wanted = on_children_wanted
        self._resting: set[Run] = set()
        self._returning: dict[Run, None] = {}
        """Who has rested, goes on, and waits for a slot: before all that is pending."""
        self._refusals: set[asyncio.Task[None]] = set()
        self._on_slot = on_slot
        self._on_result = on_result
        self._on_release = on_release
        self._on_awoken = on_awoken
        self._on_timer = on_timer
        self.handed_over = 0
        """How many workflows this worker let go of, unfinished."""
        self._nothing_reserved = asyncio.Event()
        self._nothing_reserved.set()
        self._left: dict[UUID, tuple[UUID, int]] = {}
        """Those whose flush may still be under way, though they don't run here any more: worker id and epoch."""
        self._left_in = 0
        self._active: set[Run] = set()
        self._quiet = asyncio.Event()

    @property
    def free(self) -> int:
        """How many more runs may begin.

        A run whose code has ended takes no slot, written or not; but while they end faster than they can be written,
        nothing begins: memory holds what is under way, not all that is pending.
        """
        return 0 if self.writer.is_full else self._room - len(self._returning)

    @property
    def _room(self) -> int:
        """How many slots nobody has."""
        return self._concurrency - len(self._active) - len(self.reserved) - self.claiming

    @property
    def held(self) -> int:
        """How many entries this worker should hold, give or take what is in flight."""
        return len(self.runs)

    @property
    def is_at_rest(self) -> bool:
        """Whether all that runs here only waits for the clock, or for somebody outside."""
        return all(run.is_at_rest for run in self.runs.values()) and not self.reserved and not self.claiming

    @property
    def seen(self) -> int:
        """How often, in all, these runs have seen themselves woken."""
        return sum(run.seen for run in self.runs.values())

    @property
    def busy(self) -> list[str]:
        """What goes on in the runs that aren't at rest, in words."""
        return [
            f"workflow {run.name!r} runs step {', '.join(map(repr, run.bodies))}"
            if run.bodies
            else f"workflow {run.name!r} runs, or waits for what isn't of perdure"
            for run in self.runs.values()
            if not run.is_at_rest
        ]

    def abandon(self, reason: str) -> None:
        """Let go of everything at once, as if this process had died: what isn't written yet is gone."""
        for run in list(self.runs.values()):
            self.run_lost(run, reason)

    def time(self) -> datetime:
        """The database's time."""
        return self._time()

    def reserve(self, id: UUID) -> None:
        """A workflow is being started here, and will run here."""
        self.reserved.add(id)
        self._nothing_reserved.clear()

    def unreserve(self, ids: Iterable[UUID]) -> None:
        """Those are started, or won't be."""
        self.reserved.difference_update(ids)
        if not self.reserved:
            self._nothing_reserved.set()
        self._readmit()

    def claimed(self) -> None:
        """No claim is under way any more, and what it has brought runs."""
        self.claiming = 0
        self._readmit()

    async def nothing_reserved(self) -> None:
        """Wait until no start is under way that may be claimed at its birth."""
        await self._nothing_reserved.wait()

    def launch(self, claims: Iterable[Claim]) -> None:
        """Run these. A claim of what still runs here ends the old run first, with all that it had queued.

        Both have the same epoch where a failover has lost the earlier claim. Then a flush of the old run that is under
        way would count as the new one's: so this claim is let go of, and made again under another epoch.
        """
        for claim in claims:
            former = self.runs.get(claim.workflow_id)
            if former is not None:
                self._drop(former, "claimed again")
            if self._left and self._has_left(claim):
                self._on_release(
                    Release(workflow_id=claim.workflow_id, worker_id=claim.worker_id, epoch=claim.epoch, stalls=0)
                )
                continue
            if telemetry.wanted(telemetry.WorkflowClaimed):
                telemetry.emit(
                    telemetry.WorkflowClaimed(
                        workflow_id=claim.workflow_id, name=claim.name, epoch=claim.epoch, recoveries=claim.recoveries
                    )
                )
            run = Run(self, claim, self._workflows[claim.name])
            self.runs[run.id] = run
            if claim.stalls >= self._max_recoveries:
                run.over = True
                self.writer.complete(run, "error", failures.record(RecoveryLimitExceeded(claim.stalls)))
                continue
            self._active.add(run)
            run.start()

    def drop(self, ids: Iterable[UUID], reason: str) -> int:
        """End runs that this worker doesn't hold; returns how many there were."""
        runs = [run for id in ids if (run := self.runs.get(id)) is not None]
        for run in runs:
            self._drop(run, reason)
        return len(runs)

    async def drain(self, grace: timedelta) -> None:
        """Let steps that run come to their end, for so long; whatever wants to begin another is handed over."""
        self.draining = True
        self._quiet.clear()
        self._readmit()
        for run in [*self._active, *self._resting]:
            run.consider()
        if self._active:
            try:
                async with asyncio.timeout(grace.total_seconds()):
                    await self._quiet.wait()
            except TimeoutError:
                pass
        for run in list(self._active):
            self.run_handed_over(run)

    # --- what runs tell (the protocol Host) ------------------------------------------------------------------------

    def refuse(self, id: UUID, question: UUID, answer: str) -> None:
        task = self.loop.create_task(self.exchange.refuse(id, question, answer))
        self._refusals.add(task)
        task.add_done_callback(self._refused)

    def _refused(self, task: asyncio.Task[None]) -> None:
        self._refusals.discard(task)
        if not task.cancelled() and task.exception() is not None:  # the next run refuses it again
            telemetry.emit(telemetry.DatabaseLost(component="refusals", reason=str(task.exception())))

    def look_for_children(self, id: UUID) -> None:
        self._on_children_wanted(id)

    async def cancel_children(self, ids: Iterable[UUID]) -> None:
        ids = list(ids)
        for pause in backoff():
            try:
                return await self.exchange.cancel(ids)
            except _PASSING:
                await asyncio.sleep(pause)
        raise AssertionError("backoff never ends")

    async def begin_anew(self, run: Run, input: str) -> None:
        for pause in backoff():
            try:
                queue = await self.exchange.begin_anew(
                    run.worker_id, run.id, run.epoch, input, self.version, was_told=run.was_told_to_end
                )
                break
            except _PASSING:
                await asyncio.sleep(pause)
        else:
            raise AssertionError("backoff never ends")
        if self.runs.get(run.id) is run:
            del self.runs[run.id]
        if queue is not None:  # else somebody else has it; or it is done, and the answer was lost
            telemetry.emit(telemetry.WorkflowContinued(workflow_id=run.id, name=run.name))
            self._on_pending({queue})

    def children_born(self, queues: set[str]) -> None:
        self._on_pending(queues)

    def is_home(self, settings: object) -> bool:
        return settings == self._settings

    def run_rests(self, run: Run) -> bool:
        if run in self._resting:
            return True
        if len(self._resting) + len(self._returning) >= _MOST_RESTING * self._concurrency:
            return False
        self._active.discard(run)
        self._resting.add(run)
        self._slot_freed()
        return True

    def run_moves(self, run: Run) -> bool:
        if run in self._resting:
            self._resting.discard(run)
            if self._room <= 0 and not self.draining:
                self._returning[run] = None
                return False
            self._active.add(run)
        return True

    def code_ended(self, run: Run) -> None:
        self._resting.discard(run)
        self._returning.pop(run, None)
        if run in self._active:
            self._active.discard(run)
            if not self._active:
                self._quiet.set()
            self._slot_freed()

    def _slot_freed(self) -> None:
        self._readmit()
        self._on_slot()

    def _readmit(self) -> None:
        """Let those go on that wait for a slot, as many as there are; when this worker stops, all of them."""
        while self._returning and (self._room > 0 or self.draining):
            run = next(iter(self._returning))
            del self._returning[run]
            self._active.add(run)
            run.go_on()

    def run_ended(self, run: Run, status: str, payload: str) -> None:
        if self.runs.get(run.id) is run:
            del self.runs[run.id]
        if telemetry.wanted(telemetry.WorkflowEnded):
            telemetry.emit(telemetry.WorkflowEnded(workflow_id=run.id, name=run.name, status=status))
        if run.parent_id is not None:
            parent = self.runs.get(run.parent_id)
            if parent is not None:
                parent.child_ended(run.id, Ended(status, payload))
            self._on_child_ended(parent is not None)
        self._on_result(run.id, status, payload)

    def run_suspended(self, run: Run, waiting_for: str, seconds: float | None) -> None:
        if self.runs.get(run.id) is run:
            del self.runs[run.id]
        if seconds is not None and seconds < self.suspends_from:  # earlier than the timers would look
            self._on_timer()
        if telemetry.wanted(telemetry.WorkflowSuspended):
            telemetry.emit(
                telemetry.WorkflowSuspended(workflow_id=run.id, name=run.name, waiting_for=waiting_for, seconds=seconds)
            )

    def run_awoken(self, run: Run) -> None:
        if run.over:  # its code has ended, with an attempt that failed: another run goes on
            self._release(run, stalls=0)
        else:
            self._on_awoken(run.id)

    def run_lost(self, run: Run, reason: str) -> None:
        self._drop(run, reason)
        # Not held any more: this finds nothing. A hostile row is in its way: another try, which counts as stalled.
        self._release(run, stalls=1)

    def run_handed_over(self, run: Run) -> None:
        """Its recorded outcomes are still written; the release comes behind them."""
        if run.over:
            return
        self.handed_over += 1
        run.stop()
        self._release(run, stalls=0)

    def _drop(self, run: Run, reason: str) -> None:
        if self._leave(run):
            telemetry.emit(telemetry.RunAbandoned(workflow_id=run.id, name=run.name, epoch=run.epoch, reason=reason))
        run.end()

    def _leave(self, run: Run) -> bool:
        """It doesn't run here any more; returns whether it did."""
        if self.runs.get(run.id) is not run:
            return False
        del self.runs[run.id]
        if self._left_in != self.writer.flushes:  # what was under way before is written, or lost
            self._left_in = self.writer.flushes
            self._left.clear()
        self._left[run.id] = (run.worker_id, run.epoch)
        return True

    def _has_left(self, claim: Claim) -> bool:
        """Whether a flush may be under way that would count as one of this claim."""
        is_now = self._left_in == self.writer.flushes
        return is_now and self._left.get(claim.workflow_id) == (claim.worker_id, claim.epoch)

    def _release(self, run: Run, *, stalls: int) -> None:
        self._leave(run)
        self._on_release(Release(workflow_id=run.id, worker_id=run.worker_id, epoch=run.epoch, stalls=stalls))
