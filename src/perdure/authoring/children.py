"""Steps by which workflow code starts what the flush can't start, and looks at what isn't its child."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

from perdure.authoring.context import required
from perdure.authoring.messages import FOR_EVER
from perdure.authoring.steps import step
from perdure.model.retry import RetryAfter

_LOOK = timedelta(seconds=2)  # longer than a workflow stays in memory for: others may need its slot to come to an end


# Once: the workflow has a key. By name: what it is started with has an id that isn't the same twice.
@step(name="start()", idempotent=True, retry=FOR_EVER, match="name")
async def START(new: Any) -> dict[str, Any]:  # noqa: N802 - a step, which is a value
    """Start a child under a key."""
    return await required("start()").start_elsewhere(new)


@step(name="result()", idempotent=True, retry=FOR_EVER)
async def RESULT(id: str) -> tuple[str, str]:  # noqa: N802
    """How a workflow that isn't a child ended, status and payload: looked for now and then, until it has."""
    ended = await required("result()").result_elsewhere(UUID(id))
    if ended is None:
        raise RetryAfter(_LOOK, counts=False)
    return ended
