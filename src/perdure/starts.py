"""What a start is made of: an invocation and its options, checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, Generic, cast
from uuid import UUID

from typing_extensions import TypeVar

from perdure.annotations import ANY
from perdure.authoring.context import CURRENT
from perdure.authoring.workflows import Invocation
from perdure.codec import shape
from perdure.errors import SerializationError, WrongPlace
from perdure.model.ids import new_id
from perdure.model.keys import check_name
from perdure.store.programs import NewWorkflow, OnConflict

R = TypeVar("R")
Json = dict[str, Any]

_MAX_KEY = 1000


class Start(Generic[R]):
    """An invocation with options of its own, for `start_many`."""

    def __init__(
        self,
        invocation: Invocation[R],
        *,
        key: str | None = None,
        priority: int = 0,
        partition: str | None = None,
        delay: timedelta | None = None,
        attributes: Json | None = None,
    ) -> None:
        self.invocation = invocation
        self.key = key
        self.priority = priority
        self.partition = partition
        self.delay = delay
        self.attributes = attributes


def prepare(
    invocation: Invocation[Any],
    *,
    encoded: Callable[[str], str],
    version: str | None,
    limit: int,
    id: UUID | None = None,
    key: str | None = None,
    on_conflict: OnConflict = "attach",
    queue: str | None = None,
    priority: int = 0,
    partition: str | None = None,
    delay: timedelta | None = None,
    start_at: datetime | None = None,
    timeout: timedelta | None = None,
    attributes: Json | None = None,
) -> NewWorkflow:
    """The workflow that a start asks for; the options are those of `Client.start`.

    Raises:
        WrongPlace: It is no invocation.
        InvalidArguments: The arguments don't fit the signature.
        SerializationError: JSON can't carry an argument.
        ValueError: An option makes no sense.
    """
    taken(invocation)
    context = CURRENT.get()
    if context is not None and key is None and not context.is_workflow:
        key = context.start_key(invocation.name)
    text = encoded(invocation.input(limit))
    if key is not None:
        _check_key(key)
    if on_conflict not in ("attach", "raise", "replace_finished"):
        raise ValueError(f"on_conflict={on_conflict!r} is none; use 'attach', 'raise' or 'replace_finished'")
    if delay is not None and start_at is not None:
        raise ValueError("delay= and start_at= both say when to start; use one of them")
    if not -(2**31) <= priority < 2**31:
        raise ValueError(f"priority={priority} is out of range; use -2147483648 to 2147483647")
    if timeout is not None and timeout <= timedelta(0):
        raise ValueError(f"timeout={timeout} leaves no time; use more than 0")
    workflow = invocation.workflow
    if timeout is None and workflow is not None:
        timeout = workflow.timeout
    own_queue = workflow.queue if workflow is not None else "default"
    return NewWorkflow(
        id=new_id(key) if id is None or key is not None else id,
        name=invocation.name if workflow is not None else check_name("workflow", invocation.name),
        queue=own_queue if queue is None else check_name("queue", queue),
        input=text,
        priority=priority,
        partition=None if partition is None else check_name("partition", partition),
        attributes=None if attributes is None else attributes_text(attributes, limit),
        version=(workflow.version if workflow is not None else None) or version,
        key=key,
        on_conflict=on_conflict,
        delay=None if delay is None else max(0.0, delay.total_seconds()),
        start_at=aware("start_at", start_at),
        timeout=None if timeout is None else timeout.total_seconds(),
    )


def taken(invocation: Invocation[Any]) -> None:
    """A verb has it now, so it won't warn that nobody started it.

    Raises:
        WrongPlace: It is no invocation.
    """
    if not isinstance(invocation, Invocation):
        raise WrongPlace(
            f"a start takes an invocation such as checkout(42), not {type(invocation).__name__}; "
            "call the workflow with its arguments"
        )
    invocation.taken()


def _check_key(key: str) -> None:
    if not isinstance(key, str) or not key or len(key) > _MAX_KEY or "\0" in key:
        raise ValueError(f"key={key!r} is no key; use a text of 1 to {_MAX_KEY} characters, without NUL")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise ValueError(f"key={key!r} has a lone surrogate, which PostgreSQL can't store; leave it out") from None


def aware(name: str, when: datetime | None) -> datetime | None:
    """The instant, if it says its time zone."""
    if when is not None and when.tzinfo is None:
        raise ValueError(f"{name}={when!r} has no time zone; use an aware datetime, such as datetime.now(UTC)")
    return when


def attributes_text(attributes: Json, limit: int) -> str:
    """Attributes as JSON."""
    if not isinstance(attributes, dict):
        raise SerializationError("attributes=", type(attributes).__name__, "use a dict with JSON values")
    return shape(ANY).dump(cast("Any", attributes), "attributes=", limit)
