"""Where a step's body runs: what `current()` and the primitives find there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from datetime import datetime, timedelta
from typing import Any, NoReturn, Protocol
from uuid import UUID, uuid5

from perdure.authoring.steps import Step, direct
from perdure.errors import NotInWorkflow, RunEnded, StepTimeout, WrongPlace
from perdure.model.keys import answer_name, occurrence
from perdure.store.programs import NewWorkflow, Started

_MESSAGES = UUID("6f0d4a52-5f0e-5b6a-9f50-6f7065726475")
"""The namespace of messages that steps send."""


class Host(Protocol):
    """What a body may know of the process that it runs in."""

    loop: asyncio.AbstractEventLoop


class Caller(Protocol):
    """What a body may know of its run."""

    @property
    def host(self) -> Host: ...

    @property
    def id(self) -> UUID: ...
    @property
    def name(self) -> str: ...
    @property
    def origin(self) -> str: ...
    @property
    def over(self) -> bool: ...

    deadline: datetime | None

    @property
    def max_payload(self) -> int: ...
    def time(self) -> str: ...
    def post(self, target: UUID, topic: str, payload: str, id: UUID) -> Coroutine[Any, Any, None]: ...
    def publish(self, name: str, payload: str, id: UUID) -> Coroutine[Any, Any, None]: ...
    def subscribe(self, owner: UUID, name: str) -> Coroutine[Any, Any, str | None]: ...
    def set_attributes(self, attributes: str) -> Coroutine[Any, Any, None]: ...
    def write_stream_in_step(self, key: str, attempt: int, name: str, payload: str) -> Coroutine[Any, Any, None]: ...
    def start_elsewhere(self, new: NewWorkflow) -> Coroutine[Any, Any, Started]: ...
    def result_elsewhere(self, id: UUID) -> Coroutine[Any, Any, tuple[str, str] | None]: ...


class StepContext:
    """Where a step's body runs."""

    __slots__ = ("_key", "_run", "_starts", "_step", "attempt", "is_cancelled")

    def __init__(self, run: Caller, step: Step[..., Any], key: str, attempt: int) -> None:
        self._run = run
        self._step = step
        self._key = key
        self._starts: dict[str, int] = {}
        self.attempt = attempt
        self.is_cancelled = False

    is_workflow = False

    @property
    def has_ended(self) -> bool:
        return self._run.over

    def child_key(self, name: str) -> None:
        """What is started in a step is no child."""

    def child(self, invocation: Any, key: str | None) -> NoReturn:
        raise WrongPlace(
            f"workflow {invocation.name!r} was awaited inside a step; use app.run(...) or app.start(...), or await it "
            "in the workflow's own code"
        )

    def start_child(self, new: Any, key: str | None, *, detached: bool) -> NoReturn:
        raise NotInWorkflow("start_child()")

    def outcome_of(self, id: UUID, key: str | None = None) -> NoReturn:
        raise NotInWorkflow("outcome_of()")

    def is_home(self, settings: object) -> bool:
        return True

    def set_attributes(self, attributes: str) -> Coroutine[Any, Any, None]:
        return self._run.set_attributes(attributes)

    def continue_as_new(self, invocation: Any) -> NoReturn:
        invocation.close()
        raise NotInWorkflow("continue_as_new()", "call it in the workflow function, not in a step")

    def write_stream(self, name: str, payload: str) -> Coroutine[Any, Any, None]:
        return self._run.write_stream_in_step(self._key, self.attempt, name, payload)

    async def start_elsewhere(self, new: NewWorkflow) -> dict[str, Any]:
        started = await self._run.start_elsewhere(new)
        return {"id": str(started.id), "started": started.started}

    def result_elsewhere(self, id: UUID) -> Coroutine[Any, Any, tuple[str, str] | None]:
        return self._run.result_elsewhere(id)

    def call(self, step: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        """A step within a step is a plain call."""
        return direct(step, args, kwargs)

    def value(self, name: str, make: Callable[[], Any]) -> Any:
        raise NotInWorkflow(f"{name}()", "in a step use the standard library: what a step returns is recorded")

    def time(self) -> str:
        return self._run.time()

    def sleep(self, name: str, delay: Callable[[], timedelta]) -> NoReturn:
        raise NotInWorkflow(
            f"{name}()", "in a step use asyncio.sleep() or time.sleep(): what a step does isn't recorded"
        )

    def receive(self, topic: str, limit: timedelta | None) -> NoReturn:
        raise NotInWorkflow("recv()", "receive in the workflow, and give the step what came")

    def send(self, target: UUID, topic: str, payload: str) -> Coroutine[Any, Any, None]:
        id = uuid5(_MESSAGES, self.start_key("send"))  # the same in each attempt, so it is sent once
        return self._run.post(target, topic, payload, id)

    def announce(self, name: str, payload: str) -> Coroutine[Any, Any, None]:
        return self._run.publish(name, payload, uuid5(_MESSAGES, self.start_key(f"set_event {name}")))

    def question(self, topic: str) -> NoReturn:
        raise NotInWorkflow("answering()", "receive in the workflow, and give the step what came")

    def answer(self, question: UUID | None, payload: str) -> Coroutine[Any, Any, None]:
        assert question is not None
        name = answer_name(question)
        return self._run.publish(name, payload, uuid5(question, name))

    def awaited(self, owner: UUID, name: str) -> Coroutine[Any, Any, str | None]:
        return self._run.subscribe(owner, name)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._run.host.loop

    @property
    def max_payload(self) -> int:
        return self._run.max_payload

    def limit(self, delay: timedelta | None) -> NoReturn:
        raise NotInWorkflow("timeout()", "in a step use asyncio.timeout(), or give the step a timeout=")

    def patched(self, name: str) -> NoReturn:
        raise NotInWorkflow("patched()", "it says which of two paths a workflow's history is of; a step has none")

    def check_verb(self) -> None:
        """A step may do what it likes."""

    def start_key(self, name: str) -> str:
        """The same for the n-th start of that name in each attempt."""
        count = self._starts[name] = self._starts.get(name, 0) + 1
        return f"{self.idempotency_key}/{occurrence(name, count)}"

    @property
    def id(self) -> UUID:
        return self._run.id

    @property
    def name(self) -> str:
        return self._step.name

    @property
    def deadline(self) -> datetime | None:
        return self._run.deadline

    @property
    def idempotency_key(self) -> str:
        return f"{self._run.origin}/{self._key}"

    @property
    def replaying(self) -> bool:
        return False

    @property
    def logger(self) -> Any:
        run = self._run
        logger = logging.getLogger(f"perdure.step.{self.name}")
        extra = {"workflow_id": str(run.id), "workflow": run.name, "step": self._key, "attempt": self.attempt}
        return logging.LoggerAdapter(logger, extra)

    def check(self) -> None:
        """Raise if this attempt was cancelled or timed out, so that a thread can end early."""
        if self._run.over:
            raise RunEnded
        if self.is_cancelled and self._step.timeout is not None:
            raise StepTimeout(self.name, self._step.timeout.total_seconds())
        if self.is_cancelled:
            raise RunEnded
