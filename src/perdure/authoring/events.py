"""Events: what a workflow announces, for callers and other workflows to look at or wait for."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, cast
from uuid import UUID

from typing_extensions import TypeForm, TypeVar

from perdure.annotations import ANY
from perdure.authoring.context import required
from perdure.authoring.messages import FOR_EVER, Addressed, dumped
from perdure.authoring.steps import step
from perdure.codec import shape
from perdure.errors import SerializationError
from perdure.model.keys import check_name, event_topic

T = TypeVar("T", default=Any)


async def set_event(name: str, value: Any, /) -> None:
    """Announce something of this workflow: how far it is, a link, a decision.

    Whoever asks (`handle.get_event`, `get_event`) gets the value that was set last; all of them are kept, in the view
    `events`.

    Args:
        name: What it is called.
        value: JSON, or an instance of a class that they name as `type`.

    Raises:
        SerializationError: JSON can't carry the value.
    """
    context = required("set_event()", "it is the workflow's own; call it inside a workflow or a step")
    payload = dumped(value, f"event {name!r}", context.max_payload)
    await context.announce(check_name("event", name), payload)


async def get_event(
    workflow: Addressed | UUID, name: str, /, *, type: TypeForm[T] = ANY, timeout: timedelta | None = None
) -> T:
    """The value that another workflow set last under that name, as soon as there is one; elsewhere use the handle.

    A workflow that waits leaves memory. What it got is recorded: a replay gets the same.

    Args:
        workflow: A handle, or an id.
        name: The name that the other workflow gave to `set_event`.
        type: What the value is.
        timeout: How long to wait, durably.

    Raises:
        TimeoutError: It wasn't set in time.
        WorkflowNotFound: There is no such workflow.
        WrongState: It had ended without setting it. One that ends so while this one waits doesn't end the wait.
        SerializationError: The value doesn't fit `type`.
    """
    context = required("get_event()", "use handle.get_event() elsewhere")
    owner = workflow if isinstance(workflow, UUID) else workflow.id
    payload = await context.awaited(owner, check_name("event", name))
    if payload is None:
        payload = await context.receive(event_topic(owner, name), timeout)
    return valued(payload, name, type)


def valued(payload: str, name: str, type: TypeForm[T]) -> T:
    """The value of an event.

    Raises:
        SerializationError: It doesn't fit.
    """
    try:
        return cast("T", shape(type).load(payload))
    except ValueError as error:
        raise SerializationError(f"event {name!r}", "what was set", str(error)) from error


@step(name="set_event()", idempotent=True, retry=FOR_EVER)  # an event has an id, as a message has
async def ANNOUNCE(name: str, payload: str) -> None:  # noqa: N802 - a step, which is a value
    """What `set_event` is in a workflow's own code."""
    await required("set_event()").announce(name, payload)


@step(name="get_event()", idempotent=True, retry=FOR_EVER)
async def AWAITED(owner: str, name: str) -> str | None:  # noqa: N802
    """What `get_event` begins with: the payload, or None, and then a message will come."""
    return await required("get_event()").awaited(UUID(owner), name)
