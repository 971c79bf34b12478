"""Replaying a workflow without working on it: today's code runs over what was recorded, and stops at the first effect.

    recorded outcomes are served, in their order -> the code comes to rest: at an effect, at a wait, or at its end

Nothing is written and no step's body runs: the run has a host that is shutting down, so it lets go before any effect
and suspends at once; and a writer that takes no notes. Workflow code that waits for something else (an HTTP call, a
timer of asyncio) is ended there, as in a strict app. What the end means is decided in model/replay.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Generator, Iterable, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, NoReturn
from uuid import UUID

from perdure.authoring.workflows import Invocation, Workflow
from perdure.codec import Codec
from perdure.engine import foreign, scopes
from perdure.engine.alarms import Alarms
from perdure.engine.calls import Call, Transactions
from perdure.engine.inspection import Inspection
from perdure.engine.loop import Turns
from perdure.engine.run import Run
from perdure.engine.streams import Entry, PartOfStream
from perdure.engine.threads import Threads
from perdure.engine.writer import Writing
from perdure.failures import Catalogue
from perdure.model.keys import RESULT, waited_key
from perdure.model.records import Checkpoint, Claim, Recorded, Suspension
from perdure.model.replay import History, Replayed, Rest, judge
from perdure.store.programs import NewWorkflow
from perdure.telemetry import Event

_NOBODY = UUID(int=0)
_LOOK_SECONDS = 0.5
_PATIENCE_SECONDS = 5.0


class _Rehearsal(Run):
    """A run that remembers what it was asked for and hadn't recorded."""

    def __init__(self, host: Replays, claim: Claim, workflow: Workflow[..., Any]) -> None:
        super().__init__(host, claim, workflow)
        outcomes = self.memory.outcomes.keys() | {RESULT}
        self._waits = {
            key: recorded
            for recorded in claim.history
            if recorded.kind == "timer" and (key := waited_key(recorded.key)) not in outcomes
        }
        """Those that began, and have no outcome yet."""
        self.memory.pause = 0.0  # what it does after that is what counts
        self.new: dict[str, str] = {}
        self._asked_for: set[str] = set()

    def call(self, key: str, step: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        self._asked(key, f"step {step.name!r}")
        return super().call(key, step, args, kwargs)

    async def child(self, key: str, invocation: Invocation[Any]) -> Any:
        self._asked(key, f"child workflow {invocation.name!r}")
        return await super().child(key, invocation)

    async def write_stream(self, key: str, name: str, payload: str) -> None:
        self._asked(key, f"write_stream({name!r})")
        await super().write_stream(key, name, payload)

    async def start_child(self, key: str, new: NewWorkflow, *, detached: bool) -> UUID:
        self._asked(key, f"child workflow {new.name!r}")
        return await super().start_child(key, new, detached=detached)

    async def sleep(self, key: str, name: str, delay: Any) -> None:
        self._asked(key, f"{name}()")
        await super().sleep(key, name, delay)

    def tell(self, event: Event) -> None:
        """Nothing happens to the workflow."""

    @property
    def left(self) -> dict[str, Recorded]:
        """What was recorded, and its code hasn't asked for: outcomes, and waits and children that have none yet."""
        timers = {key: recorded for key, recorded in self._waits.items() if key in self.memory.timers}
        begun = {**self.memory.begun, **timers}
        return {**self.history, **{key: each for key, each in begun.items() if key not in self._asked_for}}

    def _asked(self, key: str, what: str) -> None:
        memory = self.memory
        self._asked_for.add(key)
        if not any(key in each for each in (self.history, memory.failed_attempts, memory.timers, memory.begun)):
            self.new.setdefault(key, what)


class _NoWriter:
    """Takes what a run records, and forgets it."""

    def __init__(self, replays: Replays) -> None:
        self._replays = replays

    def record(
        self, run: Writing, checkpoint: Checkpoint, child: NewWorkflow | None = None, *, is_patient: bool = False
    ) -> None:
        self._replays.loop.call_soon(run.written, 1)

    def hurry(self) -> None:
        pass

    def put_off(self, run: Writing, key: str, seconds: float, position: int) -> None:
        pass

    def stream(self, run: Writing, entry: Entry, part: PartOfStream | None) -> None:
        self._replays.loop.call_soon(run.streamed, 1)

    def complete(self, run: Writing, status: str, payload: str) -> None:
        codec = self._replays.codec
        text = codec.decode(payload) if codec is not None and status == "success" else payload
        self._replays.rests(run.id, Rest(note="it comes to its end", status=status, payload=text))

    def suspend(self, run: Writing, suspension: Suspension) -> None:
        self._replays.rests(run.id, Rest(note=f"it waits: {suspension.waiting_for}"))

    def discard(self, run: Writing) -> None:
        pass


class _NoTransactions:
    async def attempt(self, call: Call, began: float) -> NoReturn:
        raise AssertionError("a replay lets go before any effect")


class Replays:
    """Replays workflows, one after the other, on this event loop."""

    draining = True
    suspends_from = 0.0

    def __init__(
        self,
        *,
        workflows: Mapping[str, Workflow[..., Any]],
        catalogue: Catalogue,
        codec: Codec | None,
        max_payload: int,
        version: str,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.writer = _NoWriter(self)
        self.threads = Threads(1)
        self.transactions: Transactions = _NoTransactions()
        self.exchange: Any = None  # it lets go before any effect
        self.alarms = Alarms(self.loop, stands_still=True)
        self.catalogue = catalogue
        self.codec = codec
        self.max_payload = max_payload
        self.version = version
        self.runs: dict[UUID, Run] = {}
        self._workflows = workflows
        self._inspection = Inspection(self, strict=True, turns=Turns())
        self._rest: asyncio.Future[Rest] = self.loop.create_future()
        self._unwound = asyncio.Event()

    @contextmanager
    def installed(self) -> Generator[None]:
        """Give tasks of workflow code their scopes, in the block."""
        restore = scopes.install(self.loop)
        unwatch = self._inspection.watch_timers(self.loop)
        try:
            yield
        finally:
            unwatch()
            restore()

    def refuse(self, id: UUID, question: UUID, answer: str) -> None:
        raise AssertionError("a replay knows no messages")

    async def replay(self, history: History) -> Replayed:
        """Run the code over that history, and say what comes of it."""
        claim = Claim(
            workflow_id=history.workflow_id,
            name=history.name,
            worker_id=_NOBODY,
            epoch=0,
            input="{}",
            started_at=datetime.now(UTC),
            deadline=history.deadline,
            history=history.outcomes,
        )
        run = _Rehearsal(self, claim, self._workflows[history.name])
        self._rest, self._unwound = self.loop.create_future(), asyncio.Event()
        self.runs[run.id] = run
        run.start()
        try:
            rest = await self._at_rest(run)
        finally:
            run.stop()
            del self.runs[run.id]
        await self._unwound.wait()
        return judge(history, rest, run.left, run.new)

    async def _at_rest(self, run: Run) -> Rest:
        deadline = self.loop.time() + _PATIENCE_SECONDS
        while not self._rest.done():
            if self.loop.time() > deadline:
                places = ", ".join(sorted({foreign.place(task) for task in run.delivery.awake}))
                return _failed(f"it doesn't come to rest within {_PATIENCE_SECONDS:g} s; it waits at {places}")
            await asyncio.wait({self._rest}, timeout=_LOOK_SECONDS)
            await self._inspection.tick()
        return self._rest.result()

    def rests(self, id: UUID, rest: Rest) -> None:
        """The code of that run came to rest there; the first time counts."""
        if id in self.runs and not self._rest.done():
            self._rest.set_result(rest)

    # --- what runs tell (the protocol Host) ------------------------------------------------------------------------

    def time(self) -> datetime:
        return datetime.now(UTC)

    def look_for_children(self, id: UUID) -> None:
        pass

    async def cancel_children(self, ids: Iterable[UUID]) -> None:
        pass

    async def begin_anew(self, run: Run, input: str) -> None:
        self.rests(run.id, Rest(note="it continues as new"))

    def children_born(self, queues: set[str]) -> None:
        pass

    def is_home(self, settings: object) -> bool:
        return True

    def run_rests(self, run: Run) -> bool:
        return False

    def run_moves(self, run: Run) -> bool:
        return True

    def code_ended(self, run: Run) -> None:
        self._unwound.set()

    def run_ended(self, run: Run, status: str, payload: str) -> None:
        pass

    def run_suspended(self, run: Run, waiting_for: str, seconds: float | None) -> None:
        pass

    def run_awoken(self, run: Run) -> None:
        pass

    def run_lost(self, run: Run, reason: str) -> None:
        self.rests(run.id, _failed(reason))

    def run_handed_over(self, run: Run) -> None:
        assert isinstance(run, _Rehearsal)
        asked = next(reversed(run.new.values()), "a step that was tried before")
        self.rests(run.id, Rest(note=f"it goes on with {asked}"))
        run.stop()


def _failed(reason: str) -> Rest:
    return Rest(note=reason, status="error", payload=json.dumps({"type": "", "message": reason}))
