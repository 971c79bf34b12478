"""Attributes: what a workflow can be found by, changed from inside."""

from __future__ import annotations

from typing import Any

from perdure.authoring.context import required
from perdure.authoring.messages import FOR_EVER, dumped
from perdure.authoring.steps import step
from perdure.errors import SerializationError


async def set_attributes(attributes: dict[str, Any], /) -> None:
    """Set attributes of this workflow; others stay: `await set_attributes({"stage": "paid"})`.

    `app.workflows(attributes={"stage": "paid"})` finds it by them.

    Args:
        attributes: JSON values by name.

    Raises:
        SerializationError: It is no dict, or JSON can't carry a value.
    """
    context = required("set_attributes()", "they are the workflow's own; call it inside a workflow or a step")
    if not isinstance(attributes, dict):
        raise SerializationError("attributes", type(attributes).__name__, "use a dict with JSON values")
    await context.set_attributes(dumped(attributes, "attributes", context.max_payload))


@step(name="set_attributes()", idempotent=True, retry=FOR_EVER)
async def ATTRIBUTES(attributes: str) -> None:  # noqa: N802 - a step, which is a value
    """What `set_attributes` is in a workflow's own code."""
    await required("set_attributes()").set_attributes(attributes)
