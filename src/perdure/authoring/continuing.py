"""`continue_as_new`: a workflow begins again, with another input and an empty history."""

from __future__ import annotations

from typing import Any, NoReturn

from perdure.authoring.context import required
from perdure.authoring.workflows import Invocation


async def continue_as_new(invocation: Invocation[Any], /) -> NoReturn:
    """End this run of the workflow, and let it begin again with other arguments: `await continue_as_new(poll(cursor))`.

    For what never ends, or would have too long a history: all that was recorded so far goes, in one transaction with
    the new input. Id, key, deadline and attributes stay; so do messages that it hasn't received, events, streams, and
    children that run. Whoever waits for its result waits for that of its last run.

    It doesn't return. Code in `finally` blocks runs, sagas don't undo anything.

    Args:
        invocation: The same workflow, with new arguments.

    Raises:
        WrongPlace: Another workflow, or a task within the workflow's code.
        InvalidArguments: The arguments don't fit the signature.
    """
    await required("continue_as_new()").continue_as_new(invocation)
    raise AssertionError("it has ended")
