"""A call of a step: served from the history, or run, tried again, and recorded.

The order in which things happen, and what a crash at each point means:

    wait for the history to be served -> barrier -> body -> outcome -> its turn -> recorded and handed to the code

- before the barrier is through: nothing happened, the next worker starts the body;
- in the body, or after it and before its outcome is durable: the body runs again (at least once), under the same
  idempotency key;
- after the outcome is durable: it is served, the body never runs again.

A failed attempt that will be followed by another is recorded before its pause begins, so a crash in the pause neither
forgets the attempt nor shortens the pause. In a long pause the run may leave memory (waiting.py).

A poll (`RetryAfter(counts=False)`) may go on for months, and is no attempt, so it records none: all that a later run
must know is when the next one may begin. That is one timer under the step's key, written over by each poll, so the
history doesn't grow. What this form survives:

- a crash in the pause, a suspension, a wake for something else (another task's timer, a cancellation that the code
  survives): the next run finds the timer, and waits for what is left of it;
- a crash before the timer is written: the body is as if it hadn't ended, and runs again (at least once);
- a flush without an answer, sent again, or arriving late after newer ones: a timer's time only moves on (flush.sql).

The next poll doesn't wait until the timer is durable: it says nothing that an effect could be based on.

Where somebody has asked the workflow to end, no body begins before the code has been told.

A step that isn't simply to run again after a crash in its body (`in_doubt=`) records each attempt before it begins, and
waits until that is durable. A later run that finds such an intent, and no end of that attempt, is in doubt: it parks
the step, or asks the function that the author gave, attempt after attempt, until that knows. There may be a doubt
without a cause (the run ended between the intent and the body), but never the other way round. What sets the attempts
of a step aside sets its intents aside, too.

A step that parks (`on_exhausted="park"`) records its last attempt as such, and waits for an operator: no failure is
recorded, so the code doesn't see one. A resume sets the attempts aside, and the step begins anew.
"""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Awaitable, Callable, Coroutine
from datetime import datetime, timedelta
from typing import Any, NoReturn, Protocol
from uuid import UUID

from perdure import failures, telemetry
from perdure.authoring.context import CURRENT
from perdure.authoring.steps import Step
from perdure.engine import waiting
from perdure.engine.alarms import Alarms
from perdure.engine.delivery import Delivery
from perdure.engine.memory import Memory
from perdure.engine.scopes import Scope
from perdure.engine.step_context import StepContext
from perdure.engine.threads import Threads
from perdure.engine.waiting import Waits
from perdure.errors import RunEnded, SerializationError, StepFailed, StepInDoubt, StepTimeout
from perdure.failures import Catalogue
from perdure.hashing import arguments_hash
from perdure.model.keys import attempt_key, intent_key
from perdure.model.records import Checkpoint, Recorded
from perdure.model.retry import ONCE, Rerun, Retry, RetryAfter
from perdure.store.programs import NewWorkflow, Started

_CHANCE = random.Random()


class Transactions(Protocol):
    """Runs the body of a transactional step: its writes and its checkpoint commit together."""

    async def attempt(self, call: Call, began: float) -> Any: ...


class Host(Protocol):
    """What a call needs of the process that it runs in."""

    loop: asyncio.AbstractEventLoop
    threads: Threads
    alarms: Alarms
    catalogue: Catalogue
    transactions: Transactions
    max_payload: int
    draining: bool


class Caller(Protocol):
    """What a call needs of its run."""

    id: UUID
    name: str
    worker_id: UUID
    epoch: int
    over: bool
    delivery: Delivery
    bodies: dict[str, tuple[int, float]]
    history: dict[str, Recorded]
    memory: Memory
    seen: int
    deadline: datetime | None
    waits: Waits

    @property
    def host(self) -> Host: ...
    @property
    def origin(self) -> str: ...
    @property
    def is_asked_to_end(self) -> bool: ...
    @property
    def is_durable(self) -> bool: ...
    async def durable(self) -> None: ...
    def forget_body(self, key: str) -> None: ...
    async def body_ended(self) -> None: ...
    def record(self, checkpoint: Checkpoint, *, is_patient: bool = False) -> None: ...
    def put_off(self, key: str, seconds: float) -> None: ...
    def hand_over(self) -> None: ...
    def lost(self, reason: str) -> None: ...
    def encoded(self, text: str) -> str: ...
    def decoded(self, text: str) -> str: ...
    def time(self) -> str: ...
    def mismatch(self, recorded: Recorded, asked: str) -> RunEnded: ...
    @property
    def max_payload(self) -> int: ...
    def post(self, target: UUID, topic: str, payload: str, id: UUID) -> Coroutine[Any, Any, None]: ...
    def publish(self, name: str, payload: str, id: UUID) -> Coroutine[Any, Any, None]: ...
    def subscribe(self, owner: UUID, name: str) -> Coroutine[Any, Any, str | None]: ...
    def set_attributes(self, attributes: str) -> Coroutine[Any, Any, None]: ...
    def write_stream_in_step(self, key: str, attempt: int, name: str, payload: str) -> Coroutine[Any, Any, None]: ...
    def start_elsewhere(self, new: NewWorkflow) -> Coroutine[Any, Any, Started]: ...
    def result_elsewhere(self, id: UUID) -> Coroutine[Any, Any, tuple[str, str] | None]: ...


async def call(run: Caller, key: str, step: Step[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The outcome of a step: its value is returned, its failure raised; the same thing on every replay."""
    scope = CURRENT.get()
    if isinstance(scope, Scope):
        scope.meet()  # the call may be a task of its own
    args_hash = arguments_hash(step.parameters, args, kwargs) if step.match == "args" else 0
    if run.history or run.delivery.has_recorded or run.is_asked_to_end:
        recorded = run.history.pop(key, None)
        if recorded is not None:
            return await _replay(run, step, recorded, args_hash)
        await run.delivery.live()
    return await Call(run, key, step, args, kwargs, args_hash).outcome()


async def _replay(run: Caller, step: Step[..., Any], recorded: Recorded, args_hash: int) -> Any:
    """Serve what was recorded, when its turn comes."""
    if recorded.kind != "step":
        raise run.mismatch(recorded, f"step {step.name!r}")
    if args_hash and recorded.args_hash and args_hash != recorded.args_hash:
        raise run.mismatch(recorded, f"step {step.name!r} with other arguments")
    await run.delivery.replay(recorded.position)
    if run.over:
        raise RunEnded
    if recorded.status != "success":
        _raise(run, step, recorded.key, recorded.payload or "{}", recorded.attempts)
    try:
        return step.shape.load(run.decoded(recorded.payload or "null"))
    except (SerializationError, ValueError) as error:
        raise run.mismatch(recorded, f"a result that its annotation fits: {error}") from error


class Call:
    """One step that isn't recorded yet, over all its attempts."""

    __slots__ = (
        "args",
        "args_hash",
        "attempt",
        "cancels",
        "intended",
        "is_in_doubt",
        "key",
        "kwargs",
        "run",
        "step",
        "task",
        "thread",
    )

    def __init__(
        self, run: Caller, key: str, step: Step[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], args_hash: int
    ) -> None:
        self.run = run
        self.key = key
        self.step = step
        self.args = args
        self.kwargs = kwargs
        self.args_hash = args_hash
        self.attempt = 1
        self.intended = 0
        """The attempt whose intent is recorded."""
        self.is_in_doubt = False
        self.task: asyncio.Task[Any] | None = None
        self.cancels = 0
        """How often its task had been cancelled when the attempt began."""
        self.thread: asyncio.Future[Callable[[], Any]] | None = None

    async def outcome(self) -> Any:
        """Attempt after attempt, until there is an outcome to record."""
        await self._resume()
        task = self.task = asyncio.current_task(self.run.host.loop)
        while True:
            await self._effect_allowed()
            began = self.run.host.loop.time()
            self.cancels = 0 if task is None else task.cancelling()
            try:
                if self.step.in_doubt != "rerun":
                    await self._intend()
                return await self._attempted(began)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # SystemExit, too, is a failure of this step alone
                failure = error
                if self.run.over and isinstance(error, Exception):
                    raise RunEnded from error  # code on its way out isn't told what nobody records
                if self.run.over or self._is_unwound(error):
                    raise
            pause = self._pause_after(failure)
            if pause is not None:
                await self._try_again(failure, pause, began)
            elif isinstance(failure, StepInDoubt) or (
                self.step.on_exhausted == "park" and not isinstance(failure, SerializationError)
            ):
                await self._park(failure, began)
            else:
                await self._fail(failure, began)

    async def _attempted(self, began: float) -> Any:
        """One attempt; a success is recorded. What its body raises is raised."""
        if self.step.transaction is not None:
            return await self._in_transaction(began)
        value = await self._value()
        text, value = self.settled(value)
        position = await self.run.delivery.turn()
        self.run.record(self.checkpoint(position, "success", text, began), is_patient=self.step.pure)
        self.told("success")
        return value

    async def _value(self) -> Any:
        """What the body returns; or what the author's function says that an attempt in doubt has come to."""
        if self.is_in_doubt:
            try:
                value = await self.body(self.args, asks=True)
            except Rerun:
                self.is_in_doubt = False
            else:
                return value
        return await self.body(self.args)

    async def _intend(self) -> None:
        """Say durably that an attempt is about to begin.

        Raises:
            StepInDoubt: One began before, and the step is to be parked then.
        """
        run = self.run
        if self.is_in_doubt:
            if self.step.in_doubt == "park":
                self.is_in_doubt = False
                raise StepInDoubt(self.step.name)
            return
        if self.intended != self.attempt:  # a poll is the same attempt, over and over
            self.intended = self.attempt
            key = intent_key(self.key, self.attempt)
            position = run.delivery.position
            run.record(Checkpoint(key, "intent", position, "success", None, self.args_hash, self.attempt))
        while not run.is_durable:
            await run.durable()

    async def _in_transaction(self, began: float) -> Any:
        """The same, all of it as nobody's task: also what the author's pool does is none of the workflow's."""
        token = CURRENT.set(None)
        task = self.run.delivery.leave()
        try:
            return await self.run.host.transactions.attempt(self, began)
        finally:
            self.run.delivery.enter(task)
            CURRENT.reset(token)

    async def body(self, args: tuple[Any, ...], *, asks: bool = False) -> Any:
        """Run the body once, as nobody's task: what it calls or creates doesn't belong to the workflow.

        Args:
            args: Its positional arguments.
            asks: Run what knows whether it took effect instead.
        """
        run, step = self.run, self.step
        fn: Any = step.in_doubt if asks else step.fn
        if not asks and telemetry.wanted(telemetry.StepStarted):
            telemetry.emit(
                telemetry.StepStarted(
                    workflow_id=run.id,
                    workflow=run.name,
                    key=self.key,
                    attempt=self.attempt,
                    idempotent=step.idempotent,
                )
            )
        context = StepContext(run, step, self.key, self.attempt)
        token = CURRENT.set(context)
        task = run.delivery.leave() if len(run.delivery.tasks) > 1 else None
        run.bodies[self.key] = (self.attempt, run.host.loop.time())
        try:
            if not step.is_async and not asks:
                value = await self._in_thread(context, args)
            elif step.timeout is None:
                value = await fn(*args, **self.kwargs)
            else:
                value = await self._bounded(fn(*args, **self.kwargs), step.timeout.total_seconds())
        except Exception as error:
            if self._is_cancelled:
                raise asyncio.CancelledError from error
            raise
        else:
            # Whatever a body makes of a cancellation: it has its place in the order of delivery, before any outcome.
            if self._is_cancelled:
                raise asyncio.CancelledError
            return value
        finally:
            run.forget_body(self.key)
            if task is not None:
                run.delivery.enter(task)
            CURRENT.reset(token)

    @property
    def _is_cancelled(self) -> bool:
        """Whether the workflow's code was cancelled here since the attempt began."""
        return self.task is not None and self.task.cancelling() > self.cancels

    def _is_unwound(self, error: BaseException) -> bool:
        """Whether the workflow's code is cancelled, or thrown away; not whether the body raised the same."""
        if isinstance(error, asyncio.CancelledError):
            return self._is_cancelled
        if isinstance(error, GeneratorExit):
            try:
                return asyncio.current_task() is None
            except RuntimeError:
                return True  # the loop is gone
        return False

    async def _bounded(self, body: Awaitable[Any], seconds: float) -> Any:
        assert self.step.timeout is not None
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                return await body
        except TimeoutError:
            if limit.expired():
                raise StepTimeout(self.step.name, self.step.timeout.total_seconds()) from None
            raise

    async def _in_thread(self, context: StepContext, args: tuple[Any, ...]) -> Any:
        """Run a `def` in the pool. Timed out, it keeps its thread; the next attempt waits for that."""
        if self.thread is not None and not self.thread.done():
            await asyncio.wait({self.thread})
        seconds = self.step.timeout.total_seconds() if self.step.timeout else None
        until = self.run.host.loop.time() + (seconds or 0.0)
        self.thread = self.run.host.threads.submit(self.step.fn, args, self.kwargs)
        try:
            await asyncio.wait({self.thread}, timeout=seconds)
            if not self.thread.done():
                raise StepTimeout(self.step.name, seconds or 0.0)
        finally:
            context.is_cancelled = not self.thread.done()
        value = self.thread.result()()
        if not inspect.isawaitable(value):
            return value
        return await (value if seconds is None else self._bounded(value, until - self.run.host.loop.time()))

    # --- outcomes --------------------------------------------------------------------------------------------------

    def settled(self, value: Any) -> tuple[str, Any]:
        """The value as it will be stored, and as it will be read."""
        text, value = self.step.shape.settle(value, self._where(), self.run.host.max_payload)
        return self.run.encoded(text), value

    def checkpoint(self, position: int, status: str, payload: str, began: float) -> Checkpoint:
        """The outcome as a row."""
        duration = self.run.host.loop.time() - began
        return Checkpoint(self.key, "step", position, status, payload, self.args_hash, self.attempt, duration)

    def told(self, status: str) -> None:
        """Tell the telemetry."""
        if telemetry.wanted(telemetry.StepEnded):
            telemetry.emit(
                telemetry.StepEnded(
                    workflow_id=self.run.id,
                    workflow=self.run.name,
                    key=self.key,
                    attempt=self.attempt,
                    status=status,
                )
            )

    async def _fail(self, error: BaseException, began: float) -> NoReturn:
        """Record the failure, and raise what a replay will raise."""
        payload = failures.record(error, self.attempt)
        position = await self.run.delivery.turn()
        self.run.record(self.checkpoint(position, "error", payload, began))
        self.told("error")
        _raise(self.run, self.step, self.key, payload, self.attempt, error)

    async def _try_again(self, error: BaseException, pause: timedelta, began: float) -> None:
        """Record the failed attempt, or for a poll only when the next one is due, and wait."""
        seconds = pause.total_seconds()
        telemetry.emit(
            telemetry.StepRetries(
                workflow_id=self.run.id,
                workflow=self.run.name,
                key=self.key,
                attempt=self.attempt,
                error_type=type(error).__qualname__,
                seconds=seconds,
            )
        )
        if isinstance(error, RetryAfter) and not error.counts:
            if seconds > 0:
                self.run.put_off(self.key, seconds)
        else:
            self._record_attempt("attempt", error, began, seconds)
            self.attempt += 1
        await waiting.wait(self.run, self.key, "retry", seconds)

    async def _park(self, error: BaseException, began: float) -> None:
        """Wait for an operator; then the step is as if it had never been tried."""
        telemetry.emit(
            telemetry.StepParked(
                workflow_id=self.run.id,
                workflow=self.run.name,
                key=self.key,
                attempt=self.attempt,
                error_type=type(error).__qualname__,
            )
        )
        self._record_attempt("park", error, began, None)
        await self._parked()

    async def _parked(self) -> None:
        seen = self.run.seen
        await self.run.durable()  # an operator must see it, to be able to resume it
        self.run.seen = min(seen, self.run.seen)  # a resume that was seen meanwhile found nobody waiting: once more
        await waiting.wait(self.run, self.key, "operator", None)
        self.attempt, self.intended, self.is_in_doubt = 1, 0, False

    def _record_attempt(self, kind: str, error: BaseException, began: float, delay: float | None) -> None:
        duration = self.run.host.loop.time() - began
        payload = failures.record(error, self.attempt)
        key = attempt_key(self.key, self.attempt)
        position = self.run.delivery.position  # it draws none: it isn't delivered
        self.run.record(
            Checkpoint(key, kind, position, "error", payload, self.args_hash, self.attempt, duration, delay)
        )

    def _pause_after(self, error: BaseException) -> timedelta | None:
        if isinstance(error, SerializationError | StepInDoubt):
            return None  # the body would return the same again; an operator is to look
        retry = self.step.retry or (Retry() if isinstance(error, RetryAfter) else ONCE)
        return retry.pause(error, self.attempt, _CHANCE)

    async def _resume(self) -> None:
        """Go on after the attempts that were recorded, and with what is left of the pause."""
        left = self.run.memory.timers.pop(self.key, 0.0)
        last = self.run.memory.failed_attempts.pop(self.key, None)
        intents = self.run.memory.intents.pop(self.key, None)
        if last is not None:
            if last.kind == "park":
                return await self._parked()
            self.attempt = last.attempts + 1
            left = max(left, last.remaining or 0.0)
        if intents is not None and self.attempt in intents:
            self.is_in_doubt = self.step.in_doubt != "rerun"
            self.intended = self.attempt
        if left > 0:
            await waiting.wait(self.run, self.key, "retry", left)
        return None

    async def _effect_allowed(self) -> None:
        """The barrier; and the place where a worker that shuts down lets go of a workflow."""
        run = self.run
        if run.host.draining:
            await self._let_go()
        if run.over:
            raise RunEnded
        if not self.step.pure and not run.is_durable:
            await run.durable()

    async def _let_go(self) -> None:
        """Begin nothing more; hand the run over when its other steps have come to their end."""
        run = self.run
        await run.delivery.live()  # whose step has ended still gets its outcome
        while run.bodies:
            task = run.delivery.leave()
            try:
                await run.body_ended()
            finally:
                run.delivery.enter(task)
            await run.delivery.live()
        run.hand_over()

    def _where(self) -> str:
        return f"{self.step.where} in workflow {self.run.name!r}"


def _raise(
    run: Caller, step: Step[..., Any], key: str, payload: str, attempts: int, cause: BaseException | None = None
) -> NoReturn:
    """Raise a recorded failure: rebuilt from the record, on the first run too."""
    catalogue = run.host.catalogue.extended(step.raises) if step.raises else run.host.catalogue
    raise failures.of_step(catalogue.rebuild(payload, StepFailed), key, attempts) from cause
