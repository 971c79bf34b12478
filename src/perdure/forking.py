"""Fork and rewind: a workflow goes on from an earlier step, in a copy of it, or in place.

    what was recorded up to a step stays -> some of it is replaced -> the code runs again from there

Both are one statement. A fork is a new workflow, which says what it was forked from; the original isn't touched. A
rewind sets aside what lies behind the step, the result, and what was replaced; it stays there as history. Kept are
outcomes, by their places in the order of delivery; attempts, waits that aren't over, and requests to end are not.
A child that was started before that place, and has ended, is kept; one that still runs belongs to the original, so a
fork starts its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from perdure import management
from perdure.errors import UnknownStep, WorkflowNotFound
from perdure.management import Verb
from perdure.model.ids import new_id
from perdure.store.arrays import Texts, Uuids
from perdure.store.statements import SHARD

if TYPE_CHECKING:
    from perdure.session import Session

BEGINNING = "$input"
"""As `after=`: nothing but the input stays."""


async def fork(session: Session, id: UUID, after: str | None, patch: Mapping[str, str], version: str | None) -> UUID:
    """A new workflow that goes on behind that step of another one; returns its id.

    Args:
        session: Where.
        id: The other one.
        after: The key of the step; None: the last one of the patch, else the last one.
        patch: What takes the place of outputs, as they are stored, by the keys of the steps.
        version: Of the code that goes on.

    Raises:
        WorkflowNotFound: There is no such workflow.
        UnknownStep: It has no such step, or one of the patch isn't kept.
    """
    position = await _position(session, id, after, patch)
    copy = new_id()
    patches = (Texts(patch), Texts(patch.values()))
    while not await session.database.fetch("fork", SHARD, id, copy, position, *patches, version):
        if await session.database.fetch("started", SHARD, Uuids([copy])):
            break  # by a statement whose answer was lost
        raise WorkflowNotFound(id)
    rows = await session.database.fetch("describe", Uuids([copy]))
    session.tell(queues={row.queue for row in rows})
    return copy


async def rewind(session: Session, id: UUID, after: str | None, patch: Mapping[str, str]) -> None:
    """Let a workflow that has ended go on behind that step.

    Raises:
        WorkflowNotFound: There is no such workflow.
        UnknownStep: It has no such step, or one of the patch isn't kept.
        WrongState: It hasn't ended.
    """
    position = await _position(session, id, after, patch)
    verb = _rewinding(session, position, patch)
    outcomes = await management.apply(session, [id], verb)
    if (refusal := outcomes[id]) is not None:
        raise refusal


def _rewinding(session: Session, position: int | None, patch: Mapping[str, str]) -> Verb:
    token = uuid4().hex
    patches = (Texts(patch), Texts(patch.values()))

    async def reach(ids: Sequence[UUID]) -> Iterable[Any]:
        rows = await session.database.fetch("rewind", SHARD, Uuids(ids), token, position, *patches)
        session.tell(queues={row.queue for row in rows})
        done = () if rows else await session.database.fetch("resumed", SHARD, Uuids(ids), token)
        return rows or [management.Reached(row.id) for row in done]

    refusal = "only what has ended can be rewound; cancel or terminate it first, or fork it"
    moving = frozenset({"success", "error", "cancelled"})  # it ended behind the statement: once more
    return Verb(reach, frozenset(), moving, dict.fromkeys(("pending", "running", "waiting"), refusal))


async def _position(session: Session, id: UUID, after: str | None, patch: Mapping[str, str]) -> int | None:
    """The place of the last outcome that is kept; None: all are."""
    rows = await session.database.fetch("outcomes", SHARD, id)
    if not rows and not await session.database.fetch("started", SHARD, Uuids([id])):
        raise WorkflowNotFound(id)
    places = {row.key: row.position for row in rows}
    for key in (*([] if after in (None, BEGINNING) else [after]), *patch):
        if key not in places:
            raise UnknownStep(id, str(key), tuple(places))
    if after is None and patch:
        after = max(patch, key=lambda key: places[key])  # what was recorded behind it came from the other value
    position = None if after is None else 0 if after == BEGINNING else places[after]
    kept = [key for key, place in places.items() if position is None or place <= position]
    for key in patch:
        if key not in kept:
            raise UnknownStep(id, key, tuple(kept))
    return position
