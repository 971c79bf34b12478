"""A worker: builds the parts of the engine, runs them in one task group, and ends them in order.

    lease (a thread) · claimer -> executor -> writer · recovery · timers · requests · listener

Start: check the database, register, then claim. Stop (`stop`, SIGTERM): claim nothing more; steps that run come to
their end, for as long as `grace`, and no other begins; whatever isn't finished is handed over behind what it has
recorded; then the worker says goodbye, so that nobody waits for its lease.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from perdure import telemetry
from perdure.authoring.workflows import Workflow
from perdure.codec import Codec
from perdure.engine import scopes
from perdure.engine.alarms import Alarms
from perdure.engine.bloat import Bloat
from perdure.engine.child_results import ChildResults
from perdure.engine.claimer import Claimer
from perdure.engine.executor import Executor
from perdure.engine.inspection import Inspection
from perdure.engine.leases import Body, Lease, Registration
from perdure.engine.loop import Turns
from perdure.engine.maintenance import Maintenance
from perdure.engine.parents import Parents
from perdure.engine.recovery import Recovery
from perdure.engine.requests import Requests
from perdure.engine.threads import Threads
from perdure.engine.timers import Timers
from perdure.engine.transactions import Transactions
from perdure.engine.writer import Writer
from perdure.errors import ConfigurationError
from perdure.exchange import Exchange
from perdure.failures import Catalogue
from perdure.model.records import Claim, Result
from perdure.session import Session

SHORTEST_LEASE = timedelta(seconds=1)
_WANTED_SECONDS = 10.0
_HAND_OVER_SECONDS = 10.0
_MOST_THREADS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """The code that a worker runs."""

    app: str
    version: str
    workflows: Mapping[str, Workflow[..., Any]]
    catalogue: Catalogue
    codec: Codec | None
    retention: Mapping[str, timedelta | None]
    strict: bool = False

    @property
    def versions(self) -> tuple[str, ...]:
        """The versions that its workflows belong to."""
        return tuple({self.version, *(workflow.version or self.version for workflow in self.workflows.values())})


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """How a worker runs.

    Attributes:
        queues: The queues that it serves; None: all.
        concurrency: How many workflows run at the same time, at most.
        lease: How long it may go unheard before others take over.
        grace: How long steps may go on when it stops.
        only_version: Whether it leaves workflows that belong to another version of the code to other workers.
        suspends_from: How long a wait must be for a workflow to leave memory.
        clock_stands_still: Whether the database's clock is a test's, which puts it forward by hand.
    """

    queues: tuple[str, ...] | None = None
    concurrency: int = 100
    lease: timedelta = timedelta(seconds=10)
    grace: timedelta = timedelta(seconds=20)
    only_version: bool = False
    suspends_from: timedelta = timedelta(seconds=1)
    clock_stands_still: bool = False

    def __post_init__(self) -> None:
        if self.lease < SHORTEST_LEASE:
            raise ConfigurationError(f"lease={self.lease} is too short for heartbeats; use one second or more")
        if self.concurrency < 1:
            raise ConfigurationError(f"concurrency={self.concurrency} runs nothing; use 1 or more")
        if self.grace < timedelta(0):
            raise ConfigurationError(f"grace={self.grace} is in the past; use 0 or more")


class Worker:
    """Executes workflows, from `start` to `stop`."""

    def __init__(self, session: Session, program: Program, options: WorkerOptions) -> None:
        self._session = session
        self._program = program
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._task: asyncio.Task[None] | None = None
        self._wanted_until = float("-inf")
        self._id: UUID
        registration = Registration(
            app=program.app,
            version=program.version,
            names=tuple(sorted(program.workflows)),
            queues=options.queues,
            concurrency=options.concurrency,
            lease=options.lease,
            only_version=options.only_version,
        )
        database = session.database
        self._lease = Lease(
            session.settings,
            registration,
            on_held=self._lease_held,
            on_lost=self._lease_lost,
            on_beat=self._beat,
            known=self._known,
            long_bodies=self._long_bodies,
            connect=session.connect,
            stands_still=options.clock_stands_still,
        )
        self._threads = Threads(min(_MOST_THREADS, options.concurrency))
        self._alarms = Alarms(self._loop, stands_still=options.clock_stands_still)
        self._writer = Writer(
            database, program.version, time=self._alarms.time, on_room=lambda: self._claimer.slot_freed()
        )
        self._executor = Executor(
            workflows=program.workflows,
            writer=self._writer,
            alarms=self._alarms,
            threads=self._threads,
            transactions=Transactions(database, program.version, options.lease),
            catalogue=program.catalogue,
            codec=program.codec,
            max_payload=session.settings.max_payload,
            max_recoveries=session.settings.max_recoveries,
            version=program.version,
            suspends_from=options.suspends_from.total_seconds(),
            concurrency=options.concurrency,
            time=self._lease.time,
            exchange=Exchange(session),
            settings=session.settings,
            on_child_ended=lambda is_told: self._parents.child_ended(is_told=is_told),
            on_pending=self._pending_again,
            on_children_wanted=self._children_wanted,
            on_slot=lambda: self._claimer.slot_freed(),
            on_result=self._result,
            on_release=lambda release: self._claimer.release(release),
            on_awoken=self._look_at,
            on_timer=self.timer_set,
        )
        turns = self._turns = Turns()
        self._bloat = Bloat(database, turns=turns)
        self._claimer = Claimer(
            database,
            self._lease,
            self._executor,
            self._writer,
            queues=options.queues,
            names=registration.names,
            version=program.version,
            only_versions=program.versions if options.only_version else None,
            turns=turns,
            bloat=self._bloat,
            hears=lambda: session.listener.hears,
            on_released=self._pending_again,
        )
        lease_seconds = options.lease.total_seconds()
        self._recovery = Recovery(
            database,
            self._lease,
            interval=min(1.0, lease_seconds / 4),
            bloat=self._bloat,
            turns=turns,
            on_recovered=self._pending_again,
        )
        self._timers = Timers(
            database,
            registration.names,
            bloat=self._bloat,
            turns=turns,
            on_woken=self._pending_again,
            on_asked=self._asked,
            on_notes=lambda: self._parents.look(),
        )
        self._parents = Parents(
            database, bloat=self._bloat, turns=turns, on_woken=self._pending_again, on_asked=self._asked
        )
        self._child_results = ChildResults(database, self._executor, turns=turns)
        self._requests = Requests(
            database, self._lease, self._executor, turns=turns, on_children_wanted=self._child_results.ask
        )
        self._inspection = Inspection(self._executor, strict=program.strict, turns=turns)
        self._maintenance = Maintenance(database, program.retention, turns=turns)

    # --- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Register and begin to claim.

        Raises:
            ConfigurationError: The database refuses this worker.
        """
        self._task = asyncio.create_task(self._run(), name="perdure-worker")
        try:
            await asyncio.wait({self._task, self._started}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._task.cancel()
            raise
        if self._task.done():
            await self._task

    async def stop(self) -> None:
        """End in order; returns when everything is handed over or written."""
        self._stopping.set()
        await self.ended()

    async def ended(self) -> None:
        """Wait for the end; raises what it failed with."""
        if self._task is not None:
            await asyncio.shield(self._task)

    @property
    def is_ready(self) -> bool:
        """Whether it holds its lease, and claims."""
        return self._started.done() and self._lease.is_valid and not self._stopping.is_set()

    @property
    def worker_id(self) -> UUID | None:
        """Its present id; a lost lease ends it, and it has none until it is registered anew."""
        return self._lease.worker_id

    # --- for tests, which put the clock forward ---------------------------------------------------------------------

    def clock_shifted(self, now: datetime, to: datetime) -> None:
        """The database's clock was put forward."""
        self._lease.put_forward(to)
        self._alarms.shift((to - now).total_seconds())
        self.look_around()

    def look_around(self) -> None:
        """Look now at what is looked at now and then.

        The claimer first: it gives way to whoever has the turn, and would find it taken by the others time and again.
        """
        for part in (self._claimer, self._timers, self._recovery, self._maintenance):
            part.wake()

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing that it holds can go on by itself: no step runs, nothing is to be written or looked at."""
        return (
            self._lease.is_valid
            and self._executor.is_at_rest
            and self._writer.is_idle
            and self._claimer.is_at_rest
            and self._requests.is_at_rest
            and self._parents.is_at_rest
            and self._child_results.is_at_rest
            and not self._turns.is_taken
        )

    @property
    def executor(self) -> Executor:
        """Its runs."""
        return self._executor

    @property
    def alarms(self) -> Alarms:
        """What its runs wait for in memory."""
        return self._alarms

    async def _run(self) -> None:
        await self._session.database.reach("worker")
        await self._lease.start()
        restore = scopes.install(self._loop)
        unwatch = self._inspection.watch_timers(self._loop)
        try:
            async with asyncio.TaskGroup() as group:
                parts = [
                    group.create_task(part.run())
                    for part in (
                        self._writer,
                        self._claimer,
                        self._recovery,
                        self._timers,
                        self._requests,
                        self._parents,
                        self._child_results,
                        self._maintenance,
                        self._bloat,
                        self._inspection,
                    )
                ]
                self._session.move_in(self)
                self._started.set_result(None)
                telemetry.emit(
                    telemetry.WorkerStarted(
                        worker_id=self._id,
                        app=self._program.app,
                        names=tuple(sorted(self._program.workflows)),
                        queues=self._options.queues,
                    )
                )
                await self._stopping.wait()
                await self._wind_up()
                for part in parts:
                    part.cancel()
        finally:
            self._session.move_out()
            unwatch()
            restore()
            self._threads.close()
            await self._lease.end()
        telemetry.emit(telemetry.WorkerStopped(worker_id=self._id, handed_over=self._executor.handed_over))

    async def _wind_up(self) -> None:
        """No new work; let steps end; write everything; hand the rest over."""
        self._claimer.stop()
        self._session.move_out()
        await self._executor.drain(self._options.grace)
        with suppress(TimeoutError):  # the database is away: the leases say the rest
            async with asyncio.timeout(_HAND_OVER_SECONDS):
                await self._executor.nothing_reserved()
                await self._writer.drained()
                await self._claimer.settle()

    # --- what the lease tells --------------------------------------------------------------------------------------

    def _lease_held(self, worker_id: UUID) -> None:
        self._id = worker_id
        self._claimer.wake()

    def _lease_lost(self, worker_id: UUID, reason: str) -> None:
        """Nobody may believe what these runs say any more; the next id begins with nothing."""
        held = [run.id for run in self._executor.runs.values() if run.worker_id == worker_id]
        self._executor.drop(held, f"the lease was lost: {reason}")

    def _beat(self, held: int, wakes: int) -> None:
        self._claimer.beat(held)
        self._requests.beat(wakes)

    def _known(self) -> list[UUID] | None:
        """What the heartbeat counts: all that is ours; where many rows are dead, what is known here. In its thread."""
        return list(self._executor.runs) if self._bloat.is_heavy else None

    def _long_bodies(self, seconds: float) -> Sequence[Body]:
        """The steps that have been running for so long. Called in the lease's thread, so it copies before it looks."""
        now = self._loop.time()
        return [
            Body(workflow_id=run.id, key=key, epoch=run.epoch, attempt=attempt, seconds=now - began)
            for run in list(self._executor.runs.values())
            for key, (attempt, began) in list(run.bodies.items())
            if now - began >= seconds
        ]

    # --- what others ask for (the protocol Resident) ---------------------------------------------------------------

    def hint(self, queue: str) -> None:
        self._claimer.hint(queue)

    def asked(self, id: UUID) -> None:
        self._requests.ask(id)

    def timer_set(self) -> None:
        self._timers.wake()

    def results_wanted(self) -> None:
        self._wanted_until = self._loop.time() + _WANTED_SECONDS

    def reserve(self, queue: str, name: str, id: UUID) -> bool:
        return self._claimer.reserve(queue, name, id)

    def launch(self, claims: Sequence[Claim]) -> None:
        stopping = self._stopping.is_set()
        valid = [claim for claim in claims if claim.worker_id == self._lease.worker_id and not stopping]
        self._executor.launch(valid)
        self.forget([claim.workflow_id for claim in claims], in_doubt=len(valid) < len(claims))

    def forget(self, ids: Sequence[UUID], *, in_doubt: bool) -> None:
        self._executor.unreserve(ids)
        if in_doubt:
            self._claimer.doubt()

    # --- what runs tell --------------------------------------------------------------------------------------------

    def _result(self, id: UUID, status: str, payload: str) -> None:
        self._session.results.deliver(Result(id, status, payload))
        if self._loop.time() < self._wanted_until:
            self._session.notifier.notify(f"result {id}")

    def _children_wanted(self, id: UUID) -> None:
        self._child_results.ask(id)

    def _look_at(self, id: UUID) -> None:
        self._requests.ask(id)

    def _asked(self, ids: Iterable[UUID]) -> None:
        for id in ids:
            self._requests.ask(id)
            self._session.notifier.notify(f"workflow {id}")

    def _pending_again(self, queues: set[str]) -> None:
        for queue in queues:
            self._claimer.hint(queue)
            self._session.notifier.notify(f"queue {queue}")
