"""Streams: values that a workflow or its steps write as they go, for readers to follow."""

from __future__ import annotations

from typing import Any

from perdure.authoring.context import required
from perdure.authoring.messages import dumped
from perdure.model.keys import check_name


async def write_stream(name: str, value: Any, /) -> None:
    """Write a value to a stream of this workflow: a token, a line, a step of progress.

    Readers (`handle.read_stream`) get it within moments, and in order. From a workflow's own code it is written once,
    whatever crashes; what a step writes is void when the step runs again, and readers are told.

    Args:
        name: What the stream is called.
        value: JSON, or an instance of a class that readers name as `type`.

    Raises:
        SerializationError: JSON can't carry the value.
    """
    context = required("write_stream()", "it is the workflow's own; call it inside a workflow or a step")
    payload = dumped(value, f"an entry of stream {name!r}", context.max_payload)
    await context.write_stream(check_name("stream", name), payload)
