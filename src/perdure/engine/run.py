"""One execution of a workflow in memory: a run, known to the database by (worker id, epoch).

What the code asks for comes in by its scopes (`call`, `value`); what it records goes out to the writer.

- *Write-behind*: an outcome is handed to the code at once and to the writer's queue.
- *Barrier*: an effect (a step's body that isn't pure) begins only when everything that was delivered earlier, to any
  task of the run, is durable (`durable`). So whoever replays after a crash sees at least what the effect was based on.
- *The end*: the result travels behind all outcomes of the run, in the same flush or a later one.
- *Ended from outside* (lost, handed over, refused): the run is over from that moment. Every call of a primitive or step
  raises `RunEnded`, what it had queued is dropped, its tasks are cancelled, at most three times, and what they still
  return or raise is thrown away. So plain code in `finally` may run several times, on several workers.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from datetime import datetime
from typing import Any, Protocol, cast
from uuid import UUID

from perdure import failures, telemetry
from perdure.authoring.context import CURRENT
from perdure.authoring.workflows import Workflow
from perdure.codec import Codec
from perdure.engine import calls
from perdure.engine.delivery import Delivery
from perdure.engine.scopes import Scope
from perdure.engine.threads import Threads
from perdure.engine.writer import Writer
from perdure.errors import InvalidArguments, ReplayMismatch, RunEnded, SerializationError
from perdure.failures import Catalogue
from perdure.model.keys import INPUT
from perdure.model.records import Checkpoint, Claim, Recorded

_CANCELS = 3
_LEFT_ALONE_SECONDS = 1.0


class Host(Protocol):
    """What a run needs of the process that it runs in."""

    loop: asyncio.AbstractEventLoop
    writer: Writer
    threads: Threads
    transactions: calls.Transactions
    catalogue: Catalogue
    codec: Codec | None
    max_payload: int
    draining: bool

    def time(self) -> datetime:
        """The database's time, as well as it is known here."""
        ...

    def code_ended(self, run: Run) -> None:
        """Its code runs no more: the slot is free."""

    def run_ended(self, run: Run, status: str, payload: str) -> None:
        """Its result is durable."""

    def run_lost(self, run: Run, reason: str) -> None:
        """It is over here, without a result."""

    def run_handed_over(self, run: Run) -> None:
        """It stopped before its next step, for another worker to go on."""


class Run:
    """One execution of a workflow."""

    def __init__(self, host: Host, claim: Claim, workflow: Workflow[..., Any]) -> None:
        self.host = host
        self.workflow = workflow
        self.id: UUID = claim.workflow_id
        self.name = workflow.name
        self.worker_id = claim.worker_id
        self.epoch = claim.epoch
        self.recoveries = claim.recoveries
        self.started_at = claim.started_at
        self.attempt = 1
        self.over = False
        self.refusals = 0
        self.bodies: dict[str, tuple[int, float]] = {}
        """The steps whose bodies run now: key -> (attempt, loop time)."""
        self.history: dict[str, Recorded] = {}
        """What was recorded and hasn't been asked for yet."""
        self.failed_attempts: dict[str, Recorded] = {}
        """The last failed attempt of steps that have no outcome yet."""
        self._input = claim.input
        position = 0
        if claim.history:
            position = self._remember(claim.history)
        self.delivery = Delivery(host.loop, position)
        self._put = 0
        self._acknowledged = 0
        self._barriers: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._body_ended: asyncio.Future[None] | None = None

    def _remember(self, history: tuple[Recorded, ...]) -> int:
        """Sort the history by what it is for; returns the highest position."""
        position = 0
        for recorded in history:
            if recorded.kind == "input":
                self._input = recorded.payload or "{}"
            elif recorded.kind == "attempt":
                step_key = recorded.key.rpartition("#a")[0]
                known = self.failed_attempts.get(step_key)
                if known is None or known.attempts < recorded.attempts:
                    self.failed_attempts[step_key] = recorded
            elif recorded.key != INPUT:
                self.history[recorded.key] = recorded
                position = max(position, recorded.position)
        return position

    # --- life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to run the workflow's code, in a task of its own."""
        scope = Scope(self)
        context = copy_context()
        context.run(CURRENT.set, scope)
        task = self.host.loop.create_task(self._main(), context=context)
        scope.bind(task)
        task.add_done_callback(self._main_ended)
        task.add_done_callback(lambda _: scope.close())

    async def _main(self) -> None:
        try:
            status, payload = await self._execute()
        except RunEnded:
            return
        except Exception as error:  # ours, or a codec's: counted, so that it comes to an end
            self.host.run_lost(self, f"it could not be run: {type(error).__name__}: {error}")
            return
        if self.over:
            return
        if self.history and telemetry.wanted(telemetry.StepsUnasked):
            telemetry.emit(telemetry.StepsUnasked(workflow_id=self.id, name=self.name, keys=tuple(self.history)))
        self.over = True
        self.host.writer.complete(self, status, payload)

    async def _execute(self) -> tuple[str, str]:
        """Run the function; returns the status and the payload of the result."""
        workflow = self.workflow
        text = self.decoded(self._input)
        try:
            args, kwargs = workflow.parameters.load(text)
        except (InvalidArguments, SerializationError) as error:
            return "error", self._failure(error)
        try:
            value = await workflow.fn(*args, **kwargs)
            text, _ = workflow.shape.settle(value, workflow.where, self.host.max_payload)
            return "success", self.encoded(text)
        except (RunEnded, KeyboardInterrupt):
            raise
        except BaseException as error:
            if self.over:
                raise RunEnded from None
            return "error", self._failure(error)

    def _failure(self, error: BaseException) -> str:
        telemetry.emit(
            telemetry.WorkflowErrored(workflow_id=self.id, name=self.name, error_type=type(error).__qualname__)
        )
        return failures.record(error)

    def _main_ended(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled():
            task.exception()  # RunEnded, or what user code raised while it was unwound
        self.over = True
        if self.delivery.tasks - {task}:
            self._unwind(0)
        self.host.code_ended(self)

    def end(self) -> None:
        """It is over here: drop what it had queued, and unwind its code."""
        self.host.writer.discard(self)
        self.stop()

    def stop(self) -> None:
        """Unwind its code; what it has queued is still written."""
        if self.over:
            return
        self.over = True
        barriers, self._barriers = self._barriers, deque()
        for _, future in barriers:
            if not future.done():
                future.set_exception(RunEnded())
        self._unwind(0)

    def _unwind(self, cancels: int) -> None:
        """Cancel what still runs, a few times; what swallows that is let go, and reported."""
        alive = [task for task in self.delivery.tasks if not task.done()]
        if not alive:
            return
        if cancels < _CANCELS:
            for task in alive:
                task.cancel()
            self.host.loop.call_soon(self._unwind, cancels + 1)
        elif cancels == _CANCELS:
            self.host.loop.call_later(_LEFT_ALONE_SECONDS, self._unwind, cancels + 1)
        else:
            for task in alive:
                telemetry.emit(telemetry.RunOutlived(workflow_id=self.id, name=self.name, task=task.get_name()))
            self.host.code_ended(self)

    # --- what its code asks for ------------------------------------------------------------------------------------

    def adopt(self, task: asyncio.Task[Any]) -> None:
        """A task of the workflow's code."""
        self.delivery.adopt(task)

    def call(self, key: str, step: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        """A call of a step, under the key that was drawn for it."""
        if self.over:
            raise RunEnded
        coroutine: Any = calls.call(self, key, step, args, kwargs)
        coroutine.__qualname__ = step.name  # what asyncio and Python's own warnings call it
        return cast("Coroutine[Any, Any, Any]", coroutine)

    def value(self, key: str, make: Callable[[], Any]) -> Any:
        """A value made once: recorded at once, without waiting."""
        if self.over:
            raise RunEnded
        recorded = self.history.pop(key, None)
        if recorded is not None:
            if recorded.kind != "value":
                raise ReplayMismatch(key, f"a {recorded.kind}", "a value")
            return json.loads(recorded.payload or "null")
        value = make()
        self.record(Checkpoint(key, "value", self.delivery.next(), "success", json.dumps(value)))
        return value

    def time(self) -> str:
        """The database's time, in ISO format."""
        return self.host.time().isoformat()

    @property
    def replaying(self) -> bool:
        """Whether something recorded is still to be served."""
        return bool(self.history)

    @property
    def logger(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger that names the workflow, and says nothing twice."""
        return _Logger(logging.getLogger(f"perdure.workflow.{self.name}"), self)

    # --- what it records -------------------------------------------------------------------------------------------

    def record(self, checkpoint: Checkpoint) -> None:
        """Hand an outcome to the writer."""
        if self.over:
            raise RunEnded
        self._put += 1
        self.host.writer.record(self, checkpoint)

    @property
    def is_durable(self) -> bool:
        """Whether everything that was delivered so far is."""
        return self._acknowledged == self._put

    async def durable(self) -> None:
        """Wait until everything that was delivered so far is durable."""
        if self._acknowledged < self._put:
            future: asyncio.Future[None] = self.host.loop.create_future()
            self._barriers.append((self._put, future))
            await future
        if self.over:
            raise RunEnded

    def forget_body(self, key: str) -> None:
        """The body of a step has ended."""
        self.bodies.pop(key, None)
        if self._body_ended is not None and not self._body_ended.done():
            self._body_ended.set_result(None)

    async def body_ended(self) -> None:
        """Wait until the body of some step has ended."""
        if self._body_ended is None or self._body_ended.done():
            self._body_ended = self.host.loop.create_future()
        await asyncio.shield(self._body_ended)

    def hand_over(self) -> None:
        """Stop before the next step: what is recorded stays, another worker goes on."""
        if not self.over:
            self.host.run_handed_over(self)

    def encoded(self, text: str) -> str:
        """A payload as it is stored."""
        return text if self.host.codec is None else self.host.codec.encode(text)

    def decoded(self, text: str) -> str:
        """A payload as it was before it was stored."""
        return text if self.host.codec is None else self.host.codec.decode(text)

    # --- what the writer tells -------------------------------------------------------------------------------------

    def written(self, checkpoints: int) -> None:
        self._acknowledged += checkpoints
        while self._barriers and self._barriers[0][0] <= self._acknowledged:
            _, future = self._barriers.popleft()
            if not future.done():
                future.set_result(None)

    def ended(self, status: str, payload: str) -> None:
        self.host.run_ended(self, status, payload)

    def lost(self, reason: str) -> None:
        self.host.run_lost(self, reason)

    def refused(self, reason: str) -> None:
        self.end()
        self.refusals += 1
        if self.refusals > 1:
            self.host.run_lost(self, reason)
            return
        error = SerializationError(f"a checkpoint of workflow {self.name!r}", "as PostgreSQL sees it", reason)
        self.host.writer.complete(self, "error", failures.record(error))


class _Logger(logging.LoggerAdapter[logging.Logger]):
    def __init__(self, logger: logging.Logger, run: Run) -> None:
        super().__init__(logger, {"workflow_id": str(run.id), "workflow": run.name})
        self._run = run

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - logging's name
        return not self._run.replaying and super().isEnabledFor(level)
