"""Messages between workflows: `send` and `recv`."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol, cast
from uuid import UUID

from typing_extensions import TypeForm, TypeVar

from perdure.annotations import ANY
from perdure.authoring.context import required
from perdure.authoring.steps import step
from perdure.codec import shape
from perdure.errors import DatabaseUnavailable, SerializationError
from perdure.model.keys import check_name
from perdure.model.retry import Retry

T = TypeVar("T", default=Any)

_PLAIN = frozenset({type(None), bool, int, float, str, list, tuple, dict})


class Addressed(Protocol):
    """What has the id of a workflow, such as a handle."""

    @property
    def id(self) -> UUID: ...


async def recv(topic: str, /, *, type: TypeForm[T] = ANY, timeout: timedelta | None = None) -> T:
    """The next message of a topic that was sent to this workflow, in the order in which they were sent.

    A workflow that waits leaves memory. What was received is recorded: a replay gets the same message.

    Args:
        topic: What the message is about; each topic has an order of its own.
        type: What its value is; None is a value, too.
        timeout: How long to wait, durably.

    Raises:
        TimeoutError: None came in time.
        SerializationError: Its value doesn't fit `type`; it is received all the same.
    """
    context = required("recv()")
    payload = await context.receive(check_name("topic", topic), timeout)
    try:
        return cast("T", shape(type).load(payload))
    except ValueError as error:
        raise SerializationError(f"a message of topic {topic!r}", "what was sent", str(error)) from error


async def send(target: Addressed | UUID, topic: str, value: Any, /) -> None:
    """Send a message to a workflow, exactly once, whatever crashes; elsewhere use `handle.send`.

    Args:
        target: A handle, or the id of a workflow; it may be this one.
        topic: What the message is about.
        value: What `recv` gives there: JSON, or an instance of a class that it names as `type`.

    Raises:
        WorkflowNotFound: There is no such workflow.
        WrongState: It has ended.
        SerializationError: JSON can't carry the value.
    """
    context = required("send()", "use handle.send() elsewhere")
    payload = dumped(value, f"a message of topic {topic!r}", context.max_payload)
    await context.send(target if isinstance(target, UUID) else target.id, check_name("topic", topic), payload)


def dumped(value: Any, where: str, limit: int) -> str:
    """A value as JSON: by its own class, where that isn't plain JSON."""
    kind: Any = type(value)  # pyright: ignore[reportUnknownVariableType]
    return shape(ANY if kind in _PLAIN else kind).dump(value, where, limit)


FOR_EVER = Retry(max_attempts=None, maximum=timedelta(seconds=10), retry_on=(DatabaseUnavailable,))
"""What perdure's own steps do where the database is away."""


@step(name="send()", idempotent=True, retry=FOR_EVER)  # a message has an id, which its place in the workflow gives it
async def POST(target: str, topic: str, payload: str) -> None:  # noqa: N802 - a step, which is a value
    """What `send` is in a workflow's own code."""
    await required("send()").send(UUID(target), topic, payload)
