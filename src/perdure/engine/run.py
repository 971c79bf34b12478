"""One execution of a workflow in memory: a run, known to the database by (worker id, epoch).

What the code asks for comes in by its scopes (`call`, `value`); what it records goes out to the writer.

- *Write-behind*: an outcome is handed to the code at once and to the writer's queue.
- *Barrier*: an effect (a step's body that isn't pure) begins only when everything that was delivered earlier, to any
  task of the run, is durable (`durable`). So whoever replays after a crash sees at least what the effect was based on.
- *The end*: the result travels behind all outcomes of the run, in the same flush or a later one.
- *Out of memory*: when all tasks of a run wait for what needn't be waited for here, and for longer than a moment, the
  run suspends, behind all that it has queued (see writer.py for what comes in between). Its tasks are unwound like
  those of a run that ended; a later run replays to where they stood, perhaps on another worker.
- *Asked to end* (a cancellation, a deadline): CancelledError goes to the workflow's code at its await, as an outcome:
  recorded, with a position, when the run is at rest. So a replay gets it at the same place, and what the code does
  about it (compensations) is served like anything else. It is delivered once.
- *Failed, with attempts left* (`retry=` of the workflow): it suspends, and what it failed from is set aside in the same
  flush, so the next run asks for that anew, and replays everything else. Woken before the pause is over (an operator
  resumed another step of it, a suspension that was refused), it suspends again without running any code; asked to end,
  it goes on at once, because its code is to be told.
- *Ended from outside* (lost, handed over, refused): the run is over from that moment. Every call of a primitive or step
  raises `RunEnded`, what it had queued is dropped, its tasks are cancelled, at most three times, and what they still
  return or raise is thrown away. So plain code in `finally` may run several times, on several workers.
"""

from __future__ import annotations

import asyncio
import json
import logging
import weakref
from collections.abc import Callable, Collection, Coroutine, Iterable
from contextvars import copy_context
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from random import Random
from types import CodeType
from typing import Any, Protocol, TypeVar, cast
from uuid import UUID

from perdure import failures, telemetry
from perdure.authoring.context import CURRENT
from perdure.authoring.workflows import Invocation, Workflow
from perdure.codec import Codec
from perdure.engine import calls, children, foreign, waiting
from perdure.engine.alarms import Alarms
from perdure.engine.children import Children, Ended
from perdure.engine.delivery import Delivery, give
from perdure.engine.inbox import Inbox, receive
from perdure.engine.memory import Memory
from perdure.engine.ports import Exchange, Records
from perdure.engine.scopes import Scope
from perdure.engine.streams import Entry, PartOfStream, Streams
from perdure.engine.threads import Threads
from perdure.engine.waiting import Limit, Waits
from perdure.errors import (
    DeadlineExceeded,
    InvalidArguments,
    Refused,
    ReplayMismatch,
    RunEnded,
    SerializationError,
    WorkflowCancelled,
    WrongPlace,
)
from perdure.failures import Catalogue
from perdure.model.keys import (
    CANCEL,
    CANCELLED,
    DEADLINE,
    RESULT,
    attempt_key,
    child_key,
    intent_key,
    timer_key,
)
from perdure.model.records import Checkpoint, Claim, Message, Recorded, Suspension
from perdure.model.retry import RetryAfter
from perdure.starts import prepare
from perdure.store.programs import NewWorkflow, Started

T = TypeVar("T")

_CANCELS = 3
_LEFT_ALONE_SECONDS = 1.0
_STAYS_SECONDS = 1.0
_STAYS_SECONDS_PER_CHECKPOINT = 0.001
"""A replay takes about a twentieth of that."""
_CHANCE = Random()
_HOPELESS = (InvalidArguments, SerializationError, ReplayMismatch)
"""What a workflow that is tried again fails with again."""


class Host(Protocol):
    """What a run needs of the process that it runs in."""

    loop: asyncio.AbstractEventLoop

    @property
    def writer(self) -> Records: ...

    threads: Threads
    transactions: calls.Transactions
    alarms: Alarms
    suspends_from: float
    catalogue: Catalogue
    codec: Codec | None
    max_payload: int
    exchange: Exchange
    draining: bool
    version: str

    def refuse(self, id: UUID, question: UUID, answer: str) -> None:
        """A question to that workflow is refused, with that answer."""

    def time(self) -> datetime:
        """The database's time, as well as it is known here."""
        ...

    def look_for_children(self, id: UUID) -> None:
        """That run waits for children that may have ended already."""

    async def cancel_children(self, ids: Iterable[UUID]) -> None:
        """Ask these workflows to end; returns when they have been asked."""

    def children_born(self, queues: set[str]) -> None:
        """Children are pending in these queues."""

    def is_home(self, settings: object) -> bool:
        """Whether a client with these settings talks to this worker's database."""
        ...

    def begin_anew(self, run: Run, input: str) -> Coroutine[Any, Any, None]:
        """Let its workflow begin again with that input."""
        ...

    def run_rests(self, run: Run) -> bool:
        """It waits for others, in memory: its slot is free meanwhile. False: it must not."""
        ...

    def run_moves(self, run: Run) -> bool:
        """It takes its slot again. False: there is none; `Run.go_on` is called when there is."""
        ...

    def code_ended(self, run: Run) -> None:
        """Its code runs no more: the slot is free."""

    def run_ended(self, run: Run, status: str, payload: str) -> None:
        """Its result is durable."""

    def run_suspended(self, run: Run, waiting_for: str, seconds: float | None) -> None:
        """It waits in the database."""

    def run_awoken(self, run: Run) -> None:
        """Somebody has something for it, and it must be looked at."""

    def run_lost(self, run: Run, reason: str) -> None:
        """It is over here, without a result."""

    def run_handed_over(self, run: Run) -> None:
        """It stopped before its next step, for another worker to go on."""


class Run:
    """One execution of a workflow."""

    __slots__ = (
        "__weakref__",
        "_acknowledged",
        "_barriers",
        "_body_ended",
        "_cancellation",
        "_children",
        "_continuation",
        "_ended",
        "_inbox",
        "_is_cancelled",
        "_is_past_code",
        "_is_unwinding",
        "_leaving",
        "_patches",
        "_put",
        "_reason",
        "_stays_until",
        "_streams",
        "_suspension",
        "_task",
        "bodies",
        "deadline",
        "delivery",
        "epoch",
        "history",
        "host",
        "id",
        "memory",
        "name",
        "over",
        "parent_id",
        "recoveries",
        "refusals",
        "seen",
        "started_at",
        "waits",
        "worker_id",
        "workflow",
    )

    def __init__(self, host: Host, claim: Claim, workflow: Workflow[..., Any]) -> None:
        self.host = host
        self.workflow = workflow
        self.id: UUID = claim.workflow_id
        self.name = workflow.name
        self.worker_id = claim.worker_id
        self.epoch = claim.epoch
        self.recoveries = claim.recoveries
        self.started_at = claim.started_at
        self.deadline: datetime | None = claim.deadline
        self.parent_id: UUID | None = claim.parent_id
        memory = self.memory = Memory(claim)
        self._continuation: str | None = None  # the input with which the workflow begins again
        self._stays_until = 0.0  # until when it rests in memory
        self._leaving: asyncio.TimerHandle | None = None
        self.over = False
        self.seen = claim.wakes
        """How often it had been woken when it last looked."""
        self.refusals = 0
        self.bodies: dict[str, tuple[int, float]] = {}
        """The steps whose bodies run now: key -> (attempt, loop time)."""
        self.history = memory.outcomes
        """What was recorded and hasn't been asked for yet."""
        self.waits = Waits(host.alarms)
        self._suspension: Suspension | None = None
        self._cancellation: str | None = None  # who asks it to end: $cancel or $deadline, once that is on its way
        self._reason = ""
        self._is_cancelled = False
        self._is_past_code = False
        self._patches: dict[str, bool] = {}
        self._is_unwinding = False
        self._ended: weakref.WeakSet[asyncio.Task[Any]] | None = None  # those of its tasks that ended by themselves
        self._task: asyncio.Task[None] | None = None
        self._children: Children | None = None
        self._streams: Streams | None = None
        self._inbox: Inbox | None = None
        if self.history or claim.messages:
            received = frozenset(each.args_hash for each in self.history.values() if each.kind == "message")
            self._inbox = self._opened(claim.messages, received)
        self.delivery = Delivery(host.loop, memory.position, self._at_rest, self._moves)
        self._put = 0
        self._acknowledged = 0
        self._barriers: list[tuple[int, asyncio.Future[None]]] = []
        self._body_ended: asyncio.Future[None] | None = None

    # --- what most workflows have none of: made when it is asked for ------------------------------------------------

    @property
    def children(self) -> Children:
        """Its children."""
        if self._children is None:
            self._children = Children(self.memory.begun)
        return self._children

    @property
    def streams(self) -> Streams:
        """Its streams."""
        if self._streams is None:
            self._streams = Streams()
        return self._streams

    @property
    def inbox(self) -> Inbox:
        """What was sent to it."""
        if self._inbox is None:
            self._inbox = self._opened((), frozenset())
        return self._inbox

    def _opened(self, messages: Iterable[Message], received: frozenset[int]) -> Inbox:
        return Inbox(messages, received, self.waits, partial(_admits, self.host, self.workflow, self.id))

    # --- life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to run the workflow's code, in a task of its own."""
        scope = Scope(self)
        context = copy_context()
        context.run(CURRENT.set, scope)
        task = self._task = self.host.loop.create_task(self._main(), context=context)
        scope.bind(task)
        task.add_done_callback(partial(self._main_ended, scope))
        if (cancelled := self.memory.cancelled_at) is not None:
            self._cancel(*_said(cancelled.payload), self.delivery.recorded(cancelled.position))
        self._heed()

    async def _main(self) -> None:
        memory = self.memory
        if memory.pause > 0 and not memory.requests and memory.cancelled_at is None:
            self._wait_for_attempt(memory.pause)
            return
        try:
            status, payload, failure = await self._execute()
            pause = None if failure is None else self._pause_after(failure)
            if failure is not None and pause is not None and self._continuation is None:
                await self._try_again(failure, payload, pause)
                return
        except RunEnded:
            if self._continuation is None or self.over:
                return
            pause, status, payload, failure = None, "", "", None
        except Exception as error:  # ours, or a codec's: counted, so that it comes to an end
            self.host.run_lost(self, f"it could not be run: {type(error).__name__}: {error}")
            return
        if self._children is not None:
            await self._children.cancelled()
        if self.over:
            return
        if self._continuation is not None:
            try:
                await self._begin_anew(self._continuation)
            except Exception as error:  # else nobody would look at it again
                self.host.run_lost(self, f"it could not begin anew: {type(error).__name__}: {error}")
            return
        if self.history and telemetry.wanted(telemetry.StepsUnasked):
            self.tell(telemetry.StepsUnasked(workflow_id=self.id, name=self.name, keys=tuple(self.history)))
        self.over = True
        self.host.writer.complete(self, status, payload)

    async def _execute(self) -> tuple[str, str, Exception | None]:
        """Run the function; returns the status and the payload of the result, and what it failed with."""
        workflow = self.workflow
        text = self.decoded(self.memory.input)
        try:
            args, kwargs = workflow.parameters.load(text)
        except (InvalidArguments, SerializationError) as error:
            return "error", self._failure(error), error
        try:
            value = await workflow.fn(*args, **kwargs)
            text, _ = workflow.shape.settle(value, workflow.where, self.host.max_payload)
            return "success", self.encoded(text), None
        except (RunEnded, KeyboardInterrupt):
            raise
        except BaseException as error:
            if self.over:
                raise RunEnded from None
            if isinstance(error, asyncio.CancelledError) and self._is_cancelled:
                if self._cancellation == DEADLINE:
                    return "error", self._failure(DeadlineExceeded(str(self.deadline))), None
                return "cancelled", failures.record(WorkflowCancelled(self._reason)), None
            return "error", self._failure(error), error if isinstance(error, Exception) else None
        finally:
            self._is_past_code = True

    async def _begin_anew(self, input: str) -> None:
        """Behind all that it has recorded; from then on nothing of this run counts."""
        try:
            await self.durable()
        except RunEnded:
            return
        self.waits.frozen = True  # nobody asks it to end now: the next run is asked
        await self.outside(self.host.begin_anew(self, input))
        self.over = True

    @property
    def was_told_to_end(self) -> bool:
        """Whether its code was told that it must end."""
        return self._is_cancelled

    def _pause_after(self, error: Exception) -> timedelta | None:
        """How long to wait until the whole workflow is tried again; None: it has failed."""
        retry = self.workflow.retry
        if retry is None or self._is_cancelled or isinstance(error, _HOPELESS):
            return None
        return retry.pause(error, self.memory.attempt, _CHANCE)

    async def _try_again(self, error: Exception, payload: str, pause: timedelta) -> None:
        """Leave memory until the next attempt; what this one failed from won't be there any more."""
        await self.durable()  # what is set aside must be there
        seconds = pause.total_seconds()
        self.tell(
            telemetry.WorkflowRetries(
                workflow_id=self.id,
                name=self.name,
                attempt=self.memory.attempt,
                error_type=type(error).__qualname__,
                seconds=seconds,
            )
        )
        if isinstance(error, RetryAfter) and not error.counts:
            self.put_off(RESULT, seconds)
        else:
            key = attempt_key(RESULT, self.memory.attempt)
            self.record(Checkpoint(key, "attempt", 0, "error", payload, 0, self.memory.attempt, None, seconds))
        aside = tuple(
            key
            for step, attempts in failures.steps(error)
            for key in (
                step,
                *(attempt_key(step, attempt) for attempt in range(1, attempts)),
                *(intent_key(step, attempt) for attempt in range(1, attempts + 1)),
                child_key(step),
            )
        )
        self._wait_for_attempt(seconds, aside)

    def _wait_for_attempt(self, seconds: float, aside: tuple[str, ...] = ()) -> None:
        self.over = True
        self._suspend(Suspension("retry", self.host.alarms.time() + seconds, self.seen, aside))

    def _failure(self, error: BaseException) -> str:
        self.tell(telemetry.WorkflowErrored(workflow_id=self.id, name=self.name, error_type=type(error).__qualname__))
        return failures.record(error)

    def tell(self, event: telemetry.Event) -> None:
        """Tell what happens to the workflow."""
        telemetry.emit(event)

    def _main_ended(self, scope: Scope, task: asyncio.Task[Any]) -> None:
        self.delivery.release(task)
        if not task.cancelled():
            task.exception()  # RunEnded, or what user code raised while it was unwound
        self.over = True
        if self.delivery.tasks and not self._is_unwinding:
            self._unwind(0)
        # The task's context refers to the run, and so does the delivery: it must not wait for the garbage collector.
        self._task = None
        self._stay_no_longer()
        self.delivery.close()
        self.host.code_ended(self)
        scope.close()

    @property
    def origin(self) -> str:
        """What idempotency keys begin with: the id, and which run of the code it is, since it continued as new."""
        return str(self.id) if self.memory.runs is None else f"{self.id}#{self.memory.runs}"

    @property
    def attempt(self) -> int:
        """Which attempt at the whole workflow this is."""
        return self.memory.attempt

    @property
    def call_code(self) -> CodeType:
        """The code of the coroutines that step calls are."""
        return calls.call.__code__

    @property
    def is_at_rest(self) -> bool:
        """Whether it only waits in memory, for the clock or for somebody outside."""
        return (
            self.waits.is_waiting
            and not self.waits.frozen
            and not self.bodies
            and not self.delivery.is_busy
            and not self.delivery.is_moving
        )

    @property
    def is_stuck_outside(self) -> bool:
        """Whether its code may wait for something that perdure doesn't know:

        a task alone with its step's body doesn't.
        """
        return bool(self.delivery.awake) and not (self.bodies and len(self.delivery.tasks) == 1)

    def fail(self, error: Exception) -> None:
        """It ends with that error, whatever its code does."""
        if not self.over:
            self.stop()
            self.host.writer.complete(self, "error", self._failure(error))

    def end(self) -> None:
        """It is over here: drop what it had queued, and unwind its code."""
        self.host.writer.discard(self)
        self.stop()

    def stop(self) -> None:
        """Unwind its code; what it has queued is still written."""
        if self.over:
            return
        self.over = True
        for task in self._ended or ():  # nor of those whom the code would have waited for
            task.exception()
        self.waits.clear()
        if self._streams is not None:
            self._streams.let_go()
        if self._children is not None:
            self._children.abandon()
        barriers, self._barriers = self._barriers, []
        for _, future in barriers:
            if not future.done():
                future.set_exception(RunEnded())
        self._unwind(0)

    def _unwind(self, cancels: int) -> None:
        """Cancel what still runs, a few times; what swallows that is let go, and reported."""
        alive = [task for task in self.delivery.tasks if not task.done()]
        self._is_unwinding = bool(alive) and cancels <= _CANCELS
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

    def release(self, task: asyncio.Task[Any]) -> None:
        """A task has ended.

        What it raises while it is unwound is thrown away: asyncio must not complain that nobody retrieved it.
        """
        self.delivery.release(task)
        if task.cancelled():
            return
        if self.over:
            task.exception()
        elif self._ended is None:
            self._ended = weakref.WeakSet((task,))
        else:
            self._ended.add(task)

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
                raise self.mismatch(recorded, f"a value ({key})")
            return json.loads(recorded.payload or "null")
        value = make()
        self.record(Checkpoint(key, "value", self.delivery.next(), "success", json.dumps(value)))
        return value

    async def sleep(self, key: str, name: str, delay: Callable[[], timedelta]) -> None:
        """A durable wait, under the key that was drawn for it."""
        if self.over:
            raise RunEnded
        await waiting.sleep(self, key, name, delay)

    def patched(self, name: str) -> bool:
        """Whether it takes the new path: it does if it hadn't come so far before, which is recorded.

        It had if there is something to be served, or if what it waited for began behind the last outcome: the code
        would have come by here before that.
        """
        if self.over:
            raise RunEnded
        if name not in self._patches:
            key = f"patched({name})"
            was_here = self.replaying or self.memory.begun_after >= self.delivery.position
            self._patches[name] = key in self.history or not was_here
            if self._patches[name]:
                self.value(key, lambda: True)
        return self._patches[name]

    async def receive(self, key: str, topic: str, limit: timedelta | None) -> str:
        """The payload of the next message of a topic, under the key that was drawn for it."""
        if self.over:
            raise RunEnded
        payload, _ = await receive(self, key, topic, limit)
        return payload

    async def question(self, key: str, topic: str) -> tuple[str, UUID | None]:
        """The same, and the id of the question, if its sender waits for an answer."""
        if self.over:
            raise RunEnded
        payload, place = await receive(self, key, topic, None)
        return payload, self.inbox.questions.get(place)

    async def child(self, key: str, invocation: Invocation[Any]) -> Any:
        """A child that is awaited, under the key that was drawn for it."""
        if self.over:
            raise RunEnded
        return await children.call(self, key, invocation)

    async def start_child(self, key: str, new: NewWorkflow, *, detached: bool) -> UUID:
        """Start a child, under the key that was drawn for it."""
        if self.over:
            raise RunEnded
        return await children.start(self, key, new, detached=detached)

    async def outcome(self, key: str, id: UUID, *, cancels: bool) -> tuple[str, str]:
        """How a child ended: status and payload."""
        if self.over:
            raise RunEnded
        return await children.outcome(self, key, id, cancels=cancels)

    def is_home(self, settings: object) -> bool:
        """Whether a client with these settings talks to this worker's database."""
        return self.host.is_home(settings)

    async def start_elsewhere(self, new: NewWorkflow) -> Started:
        """Start a child at once, under a key that makes that safe."""
        return await self.host.exchange.start(replace(new, parent_id=self.id))

    async def result_elsewhere(self, id: UUID) -> tuple[str, str] | None:
        """How any other workflow ended, if it has."""
        return await self.host.exchange.result(id, self.id)

    async def write_stream(self, key: str, name: str, payload: str) -> None:
        """Write to a stream from the workflow's own code, under the key that was drawn for it: once."""
        if self.over:
            raise RunEnded
        recorded = self.history.pop(key, None)
        if recorded is not None:
            if recorded.kind != "value":
                raise self.mismatch(recorded, f"write_stream({name!r})")
            return
        if self.history or self.delivery.has_recorded or self.is_asked_to_end:
            await self.delivery.live()
        await self.streams.open(self, name)
        self.streams.put(self, name, self.encoded(payload), "", 1)
        self.record(Checkpoint(key, "value", self.delivery.next(), "success", None))

    async def write_stream_in_step(self, key: str, attempt: int, name: str, payload: str) -> None:
        """Write to a stream from the body of a step."""
        await self.streams.open(self, name)
        self.streams.put(self, name, self.encoded(payload), key, attempt)

    async def outside(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something as nobody's task: what the pool and its driver do is none of the workflow's."""
        token = CURRENT.set(None)
        task = self.delivery.leave()
        try:
            return await work
        finally:
            self.delivery.enter(task)
            CURRENT.reset(token)

    def put_in_stream(self, entry: Entry, part: PartOfStream | None) -> None:
        """Hand an entry to the writer."""
        if self.over:
            raise RunEnded
        self.host.writer.stream(self, entry, part)

    async def set_attributes(self, attributes: str) -> None:
        """Set attributes of this workflow."""
        await self.host.exchange.set_attributes(self.id, attributes)

    def continue_as_new(self, invocation: Invocation[Any]) -> None:
        """End this run of the code; the workflow begins again when that is done."""
        if self.over:
            raise RunEnded
        if invocation.name != self.name:
            raise WrongPlace(
                f"workflow {self.name!r} can't continue as {invocation.name!r}; give it its own name, or start the "
                "other one as a child"
            )
        new = prepare(invocation, encoded=self.encoded, version=self.host.version, limit=self.max_payload)
        self._continuation = new.input
        raise RunEnded

    def child_ended(self, id: UUID, ended: Ended) -> None:
        """A child has ended: whoever waits for it goes on."""
        if self.over:
            return
        for key in self.children.ended(id, ended):
            self._stays_until = 0.0
            self.waits.release(key)

    async def post(self, target: UUID, topic: str, payload: str, id: UUID) -> None:
        """Send a message; the same id is sent once."""
        await self.host.exchange.post(target, topic, self.encoded(payload), id, self.id)

    async def publish(self, name: str, payload: str, id: UUID) -> None:
        """Set an event of this workflow; the same id is set once."""
        await self.host.exchange.publish(self.id, name, self.encoded(payload), id)

    async def subscribe(self, owner: UUID, name: str) -> str | None:
        """The payload of an event of another workflow; None: a message will tell."""
        found = await self.host.exchange.subscribe(owner, name, self.id)
        return None if found is None else self.decoded(found)

    @property
    def max_payload(self) -> int:
        """The largest payload, in bytes."""
        return self.host.max_payload

    def limit(self, key: str, delay: timedelta | None) -> Limit:
        """A durable limit of time."""
        if self.over:
            raise RunEnded
        return Limit(self, key, delay)

    def mismatch(self, recorded: Recorded, asked: str) -> RunEnded:
        """The code asks for something else than what was recorded: the workflow fails, and its code can't catch that.

        It is on a path that the history doesn't know; what it would do about an error there must not happen.
        """
        position = recorded.position
        self.fail(
            ReplayMismatch(recorded.key, recorded.described, asked, position, recorded.version or "", self.host.version)
        )
        return RunEnded()

    def time(self) -> str:
        """The database's time, in ISO format."""
        return self.host.time().isoformat()

    @property
    def replaying(self) -> bool:
        """Whether something recorded is still to be served."""
        return bool(self.history) or (self.memory.cancelled_at is not None and not self._is_cancelled)

    @property
    def logger(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger that names the workflow, and says nothing twice."""
        return _Logger(logging.getLogger(f"perdure.workflow.{self.name}"), self)

    # --- what it records -------------------------------------------------------------------------------------------

    def record(self, checkpoint: Checkpoint, *, is_patient: bool = False) -> None:
        """Hand an outcome to the writer. A patient one may wait a little: it would come again without any effect."""
        if self.over:
            raise RunEnded
        self._put += 1
        self.host.writer.record(self, checkpoint, is_patient=is_patient)

    def bear(self, checkpoint: Checkpoint, new: NewWorkflow) -> None:
        """Start a child, with the checkpoint that says so."""
        if self.over:
            raise RunEnded
        self._put += 1
        self.children.conceive(new.id, self._put)
        self.host.writer.record(self, checkpoint, new)

    def put_off(self, key: str, seconds: float) -> None:
        """Write down until when what has that key waits; it takes the place of what was written there before."""
        if self.over:
            raise RunEnded
        self.host.writer.put_off(self, timer_key(key), seconds, self.delivery.position)

    @property
    def is_durable(self) -> bool:
        """Whether everything that was delivered so far is."""
        return self._acknowledged == self._put

    async def durable(self) -> None:
        """Wait until everything that was delivered so far is durable."""
        if self._acknowledged < self._put:
            future: asyncio.Future[None] = self.host.loop.create_future()
            self._barriers.append((self._put, future))
            self.host.writer.hurry()
            task = self.delivery.leave()
            try:
                await future
            finally:
                self.delivery.enter(task)
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

    # --- leaving memory --------------------------------------------------------------------------------------------

    def consider(self) -> None:
        """Something has changed outside: see whether it can leave memory."""
        if self.delivery.is_resting:
            self._at_rest()  # which takes no slot
        else:
            self.delivery.look()

    def go_on(self) -> None:
        """It has a slot again."""
        self.delivery.go_on()

    def _at_rest(self) -> None:
        """None of its tasks can go on, and there is nothing to deliver."""
        if self.over or self.waits.frozen or self.delivery.is_busy:
            return
        if self._children is not None and (self._children.is_looked_for or self._children.is_asking):
            return
        if self._stays():
            return
        if any(not foreign.waits_for_own(task, self.delivery.tasks) for task in self.delivery.awake):
            return  # for something that perdure doesn't know, and that a replay would begin anew
        kind, due = self.waits.earliest()
        if due is not None and not self.host.draining:
            left = due - self.host.alarms.time()
            if left <= self.host.suspends_from:
                return
        self.waits.frozen = True
        hears, awaits_child = self.waits.has("message"), self.waits.has("child")
        self._suspend(Suspension(kind, due, self.seen, hears=hears, awaits_child=awaits_child))

    def _stays(self) -> bool:
        """Whether it waits in memory: for children, or for the next message after it got one in this run.

        The longer, the more a replay would cost: so a fan-in that comes child by child isn't replayed for each, or not
        for more than a few percent of the time, and a conversation goes on at once. Its slot is free meanwhile: the
        children may need it.
        """
        is_talking = self._inbox is not None and self._inbox.has_given and self.waits.has("message")
        if self.host.draining or not (is_talking or self.waits.has("child")):
            return False
        now = self.host.loop.time()
        if not self._stays_until:  # news came since it last rested
            recorded = self.delivery.position + len(self.children.known)
            self._stays_until = now + _STAYS_SECONDS + recorded * _STAYS_SECONDS_PER_CHECKPOINT
        if now >= self._stays_until or not self.host.run_rests(self):
            return False
        if self._leaving is None:
            self._leaving = self.host.loop.call_later(self._stays_until - now, self._stayed)
        return True

    def _stayed(self) -> None:
        self._leaving = None
        self.consider()

    def _stay_no_longer(self) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None

    def _moves(self) -> bool:
        return self.host.run_moves(self)

    def _suspend(self, suspension: Suspension) -> None:
        self._suspension = suspension
        self.host.writer.suspend(self, suspension)

    def suspended(self) -> None:
        suspension = self._suspension
        assert suspension is not None
        seconds = None if suspension.due is None else suspension.due - self.host.alarms.time()
        self.stop()
        self.host.run_suspended(self, suspension.waiting_for, seconds)

    def awoken(self) -> None:
        self._suspension = None
        self.waits.thaw()
        self._heed()  # what was seen while it was about to leave
        self.host.run_awoken(self)
        if not self.over:
            self.delivery.look()

    # --- being asked to end ----------------------------------------------------------------------------------------

    def look(
        self,
        wakes: int,
        requests: dict[str, str],
        messages: Iterable[Message],
        parked: frozenset[str],
        waiting: Collection[str],
    ) -> None:
        """What somebody has for it.

        Args:
            wakes: How often it was woken.
            requests: What it is asked for.
            messages: What was sent to it, and it doesn't know yet.
            parked: Which of its steps are still parked.
            waiting: Which of them waited for an operator before that was read. Of one that waits since then it isn't
                clear whether it was resumed, or parked too late to be among `parked`: then this look doesn't count.
        """
        self.memory.requests |= requests
        self._heed()
        if self.inbox.put(messages):
            self._stays_until = 0.0
        resumed = [key for key in self.waits.of("operator") if key not in parked]
        if all(key in waiting for key in resumed):
            self.seen = max(self.seen, wakes)
        for key in resumed:
            if key in waiting:
                self.waits.release(key)
        for key, attempt in list(self.memory.failed_attempts.items()):
            if attempt.kind == "park" and key not in parked:  # its code hasn't come to that step yet
                del self.memory.failed_attempts[key]

    def _heed(self) -> None:
        """It may have been asked to end: then it is told when it is at rest, after everything that was recorded."""
        if not self.memory.requests or self.over or self.waits.frozen or self._cancellation is not None:
            return
        key = next((key for key in (CANCEL, DEADLINE) if key in self.memory.requests), None)
        if key is not None:
            reason = _said(self.memory.requests[key])[1]
            self._cancel(key, reason, self.delivery.arrived(self.host.alarms.time()))

    @property
    def is_asked_to_end(self) -> bool:
        """Whether its code is to be told that it must end, and hasn't been yet."""
        return self._cancellation is not None and not self._is_cancelled

    def _cancel(self, key: str, reason: str, turn: asyncio.Future[int]) -> None:
        self._cancellation, self._reason = key, reason
        turn.add_done_callback(self._cancel_now)

    def _cancel_now(self, turn: asyncio.Future[int]) -> None:
        if turn.cancelled() or self.over or self._is_past_code:
            return  # what is done behind the code isn't cancelled; where there is another run, it finds the request
        if self.memory.cancelled_at is None:
            said = json.dumps({"by": self._cancellation, "reason": self._reason})
            self.record(Checkpoint(CANCELLED, "cancel", turn.result(), "cancelled", said))
            why = "its deadline has passed" if self._cancellation == DEADLINE else "it was cancelled"
            self.tell(telemetry.WorkflowCancelling(workflow_id=self.id, name=self.name, why=why))
        self._is_cancelled = True
        self.children.cancel(self)
        if self._task is not None:
            self._task.cancel()

    # --- what the writer tells -------------------------------------------------------------------------------------

    def written(self, checkpoints: int) -> None:
        self._acknowledged += checkpoints
        if self._children is not None and self._children.written(self._acknowledged):
            self.host.look_for_children(self.id)
        reached = 0
        for number, future in self._barriers:
            if number > self._acknowledged:
                break
            reached += 1
            self.host.loop.call_soon(give, future, None)
        del self._barriers[:reached]

    def streamed(self, entries: int) -> None:
        self.streams.written(entries)

    def born(self, queues: set[str]) -> None:
        self.host.children_born(queues)

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


def _admits(host: Host, workflow: Workflow[..., Any], id: UUID, message: Message) -> bool:
    """Whether a message may come in: a question may be refused. It doesn't know the run, which would be a cycle."""
    validator = workflow.validators.get(message.topic)
    if message.question is None or validator is None:
        return True
    codec = host.codec
    try:
        validator(message.payload if codec is None else codec.decode(message.payload))
    except Exception as error:
        refusal = error if isinstance(error, Refused) else Refused(str(error) or type(error).__name__)
        answer = f'{{"error":{failures.record(refusal)}}}'
        host.refuse(id, message.question, answer if codec is None else codec.encode(answer))
        return False
    return True


def _said(payload: str | None) -> tuple[str, str]:
    """Who asked it to end, and why, from what anybody may have written there."""
    try:
        said: Any = json.loads(payload or "null")
    except ValueError:
        said = None
    if not isinstance(said, dict):
        return CANCEL, ""
    given = cast("dict[str, Any]", said)
    return (DEADLINE if given.get("by") == DEADLINE else CANCEL), str(given.get("reason") or "")


class _Logger(logging.LoggerAdapter[logging.Logger]):
    def __init__(self, logger: logging.Logger, run: Run) -> None:
        super().__init__(logger, {"workflow_id": str(run.id), "workflow": run.name})
        self._run = run

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - logging's name
        return not self._run.replaying and super().isEnabledFor(level)
