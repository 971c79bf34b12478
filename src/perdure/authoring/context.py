"""Where code is running: the one thing that authoring and engine share.

The engine puts a `Context` into the context variable before it runs a workflow's code or a step's body; decorators and
primitives find it there. Tasks inherit it, as asyncio's contexts go; the engine's task factory gives each its own.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from datetime import datetime, timedelta
from typing import Any, Protocol
from uuid import UUID

from perdure.errors import NotInWorkflow


class Current(Protocol):
    """Where this code is running.

    Attributes:
        id: The workflow.
        name: Its name; in a step, the step's.
        attempt: Which try this is: 1, 2, ...
        deadline: When the workflow must have ended, or None.
        idempotency_key: In a step, the same for all its attempts; in a workflow, its id.
        replaying: Checkpoints are being served: what happens now has happened before.
        logger: A logger that names workflow and step, and is silent while replaying.
    """

    @property
    def id(self) -> UUID: ...
    @property
    def name(self) -> str: ...
    @property
    def attempt(self) -> int: ...
    @property
    def deadline(self) -> datetime | None: ...
    @property
    def idempotency_key(self) -> str: ...
    @property
    def replaying(self) -> bool: ...
    @property
    def logger(self) -> Any: ...

    def check(self) -> None:
        """In a `def` step: raise if the attempt was cancelled or timed out."""
        ...


class Context(Current, Protocol):
    """What the engine offers to the code that it runs."""

    def call(self, step: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        """A call of a step: recorded in a workflow, direct in a step."""
        ...

    def time(self) -> str:
        """The database's time, in ISO format."""
        ...

    def set_attributes(self, attributes: str) -> Coroutine[Any, Any, None]:
        """Set attributes of this workflow, given as a JSON object."""
        ...

    def continue_as_new(self, invocation: Any) -> Coroutine[Any, Any, None]:
        """End this run, and begin again with that input."""
        ...

    def write_stream(self, name: str, payload: str) -> Coroutine[Any, Any, None]:
        """Write to a stream of this workflow."""
        ...

    @property
    def is_workflow(self) -> bool:
        """Whether this is a workflow's own code, where a start is that of a child."""
        ...

    @property
    def has_ended(self) -> bool:
        """Whether this run of the code is over: it is only unwound."""
        ...

    def child_key(self, name: str) -> str | None:
        """Draw the key of a child of that name; None in a step."""
        ...

    def child(self, invocation: Any, key: str | None) -> Coroutine[Any, Any, Any]:
        """A child that is awaited."""
        ...

    def start_child(self, new: Any, key: str | None, *, detached: bool) -> Coroutine[Any, Any, tuple[UUID, bool]]:
        """Start a child; its id, and whether it wasn't there before."""
        ...

    def outcome_of(self, id: UUID, key: str | None = None) -> Coroutine[Any, Any, tuple[str, str, str]]:
        """How a workflow ended: the key of the wait, the status, and the payload.

        With the key of the call that started it: it is asked to end when who waits is cancelled.
        """
        ...

    def is_home(self, settings: object) -> bool:
        """Whether a client with these settings talks to this worker's database."""
        ...

    def start_elsewhere(self, new: Any) -> Coroutine[Any, Any, dict[str, Any]]:
        """Start a child under its key, at once."""
        ...

    def result_elsewhere(self, id: UUID) -> Coroutine[Any, Any, tuple[str, str] | None]:
        """How any workflow ended, status and payload; None: it hasn't."""
        ...

    def check_verb(self) -> None:
        """Whether the verbs of an app may be used here.

        Raises:
            WrongPlace: In a workflow's own code, where a replay would do it again.
        """
        ...

    def start_key(self, name: str) -> str:
        """The key of a start that has none, in a step: the same for all attempts."""
        ...

    def sleep(self, name: str, delay: Callable[[], timedelta]) -> Coroutine[Any, Any, None]:
        """A durable wait; how long is asked where it begins."""
        ...

    def receive(self, topic: str, limit: timedelta | None) -> Coroutine[Any, Any, str]:
        """The payload of the next message of a topic."""
        ...

    def send(self, target: UUID, topic: str, payload: str) -> Coroutine[Any, Any, None]:
        """Send a message, once."""
        ...

    def question(self, topic: str) -> Coroutine[Any, Any, tuple[str, UUID | None]]:
        """The payload of the next message of a topic, and its id, if its sender waits for an answer."""
        ...

    def answer(self, question: UUID | None, payload: str) -> Coroutine[Any, Any, None]:
        """Answer a question, once; None: it was a message, and nobody waits."""
        ...

    def announce(self, name: str, payload: str) -> Coroutine[Any, Any, None]:
        """Set an event of this workflow, once."""
        ...

    def awaited(self, owner: UUID, name: str) -> Coroutine[Any, Any, str | None]:
        """The payload of an event of another workflow; None: a message will bring it."""
        ...

    @property
    def loop(self) -> AbstractEventLoop:
        """The event loop of the worker."""
        ...

    @property
    def max_payload(self) -> int:
        """The largest payload, in bytes."""
        ...

    def limit(self, delay: timedelta | None) -> AbstractAsyncContextManager[Any]:
        """A durable limit of time."""
        ...

    def patched(self, name: str) -> bool:
        """Whether the workflow takes the new path at a change of its code."""
        ...

    def value(self, name: str, make: Callable[[], Any]) -> Any:
        """A JSON value made once, and recorded: on replay it is what it was."""
        ...


CURRENT: ContextVar[Context | None] = ContextVar("perdure", default=None)


def current() -> Current:
    """The workflow or step in which this code runs.

    Raises:
        NotInWorkflow: It runs in neither.
    """
    return required("current()", "call it inside a workflow or a step")


def required(what: str, advice: str = "call it inside a workflow function") -> Context:
    """The context, for a primitive that can't do without.

    Raises:
        NotInWorkflow: There is none.
    """
    context = CURRENT.get()
    if context is None:
        raise NotInWorkflow(what, advice)
    return context
