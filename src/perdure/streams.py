"""Reading a stream: what a workflow writes, as it comes, until the workflow has ended.

Entries are read in the order of their offsets. A part of them becomes void when its step is tried again; so after the
entries their parts are read, in a second statement: what has become void until then is left out, and for what the
reader has been given already it gets one `StreamReset`. The last look begins after the workflow has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic
from uuid import UUID

from typing_extensions import TypeVar

from perdure.errors import SerializationError, WorkflowNotFound
from perdure.store.arrays import Uuids
from perdure.store.statements import SHARD

if TYPE_CHECKING:
    from perdure.session import Session

T = TypeVar("T", default=Any)

_MOST = 500
_FIRST_SECONDS = 0.005
_LOOK_SECONDS = 0.25
_FINAL = ("success", "error", "cancelled")


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamEntry(Generic[T]):
    """A value in a stream.

    Attributes:
        offset: Its place, from 0 on; offsets of what is void are left out.
        value: What was written.
        attempt: At which attempt its step wrote it.
        step: The key of that step; empty for what the workflow's own code wrote.
    """

    offset: int
    value: T
    attempt: int
    step: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamReset(StreamEntry[Any]):
    """What a step had written is void, because it runs again: drop its entries from `offset` on.

    It stands among the entries, with the `step`, and the `attempt` that is void; its value is None.
    """


@dataclass(slots=True)
class _Given:
    """A part of which the reader has entries."""

    first: int
    attempt: int
    step: str


async def read(
    session: Session, id: UUID, name: str, offset: int, load: Callable[[str], T]
) -> AsyncGenerator[StreamEntry[T]]:
    """Entries of a stream from that offset on.

    Raises:
        WorkflowNotFound: There is no such workflow.
        SerializationError: A value doesn't fit.
    """
    given: dict[int, _Given] = {}
    following, pause, is_first = offset, _FIRST_SECONDS, True
    while True:
        is_over = await _is_over(session, id)
        rows = await session.database.fetch("stream", SHARD, id, name, following, _MOST)
        if rows or is_over or is_first:
            oldest = 0 if is_first else min([*given, *(row.part for row in rows)], default=0)
            parts = await session.database.fetch("stream_parts", SHARD, id, name, oldest)
            if is_first:
                given = _given_before(parts, offset)
                is_first = False
            void: set[int] = set()
            for part in parts:
                if part.is_stale or part.superseded_at is not None:
                    void.add(part.part)
                    if (past := given.pop(part.part, None)) is not None:
                        yield StreamReset(offset=past.first, value=None, attempt=past.attempt, step=past.step)
                elif part.is_settled:
                    given.pop(part.part, None)
            known = {part.part: part for part in parts}
            for row in rows:
                following = row.number + 1
                if row.part in void:
                    continue
                part = known[row.part]
                if not part.is_settled:
                    given.setdefault(row.part, _Given(row.number, part.attempt, part.key))
                yield StreamEntry(
                    offset=row.number, value=_value(row.payload, name, load), attempt=part.attempt, step=part.key
                )
        if len(rows) == _MOST:
            continue
        if is_over:
            return
        pause = _FIRST_SECONDS if rows else min(2 * pause, _LOOK_SECONDS)
        await asyncio.sleep(pause)


def _given_before(parts: Any, offset: int) -> dict[int, _Given]:
    """What the reader may have from an earlier time: not what it was told then to drop."""
    return {
        part.part: _Given(part.first, part.attempt, part.key)
        for part in parts
        if part.first < offset and (part.superseded_at is None or part.superseded_at >= offset)
    }


def _value(payload: str, name: str, load: Callable[[str], T]) -> T:
    try:
        return load(payload)
    except ValueError as error:
        raise SerializationError(f"an entry of stream {name!r}", "what was written", str(error)) from error


async def _is_over(session: Session, id: UUID) -> bool:
    states = await session.database.fetch("states", SHARD, Uuids([id]))
    if not states:
        raise WorkflowNotFound(id)
    return states[0].status in _FINAL
