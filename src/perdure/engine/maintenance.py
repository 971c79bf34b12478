"""Maintenance: what one worker at a time does now and then. Today that is retention.

There is no leader: a job is a row with the time at which it is due; whoever moves that time on does the job, for a
minute or so; should it die, the time comes again, and another one goes on from the cursor that stands in the row.

Retention walks the primary key of the workflows, which is the order of their age, a chunk at a time, and deletes those
that have ended long enough ago. It stops at a chunk of which all are too young for any of that, and begins anew at the
front some minutes later. A deletion is guarded by the row of the result, so it never meets a resume half-way; it takes
no lock that the hot path waits for.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from uuid import UUID

from perdure import telemetry
from perdure.config import KEEP
from perdure.engine.loop import Loop, Turns
from perdure.errors import DatabaseUnavailable
from perdure.store.arrays import Floats, Texts, Uuids
from perdure.store.database import Database
from perdure.store.statements import SHARD

CHUNK = 500
FIRST = UUID(int=0)
_LOOK_SECONDS = 30.0
_PAUSE_SECONDS = 0.2
_JOB_SECONDS = 60.0
_ROUND_SECONDS = 600.0


class Maintenance(Loop):
    """Does the jobs that are due."""

    name = "maintenance"

    def __init__(self, database: Database, retention: Mapping[str, timedelta | None], *, turns: Turns) -> None:
        super().__init__(_LOOK_SECONDS, turns=turns)
        self._database = database
        self._retention = retention
        self._said = False
        self._most = CHUNK

    async def tick(self) -> float | None:
        async with self.turns.turn():
            if not self._said:
                await self._say()
            return await self._prune()

    async def _say(self) -> None:
        """Write down how long workflows of these names are kept, for whoever does the job."""
        names = sorted(self._retention)
        seconds = [None if (keep := self._retention[name]) is None else keep.total_seconds() for name in names]
        await self._database.attempt("keep", SHARD, Texts(names), Floats(seconds))
        self._said = True

    async def _prune(self) -> float | None:
        """One chunk; returns the pause until the next, if there is more."""
        rows = await self._database.attempt("take_job", SHARD, "retention", _JOB_SECONDS)
        if not rows:
            return None
        try:
            last, deleted = await prune_chunk(self._database, rows[0].cursor or FIRST, most=self._most)
        except DatabaseUnavailable:  # perhaps so much hangs on them that it takes too long: fewer, then
            self._most = max(1, self._most // 8)
            raise
        self._most = min(CHUNK, self._most * 2)
        if deleted:
            telemetry.emit(telemetry.WorkflowsDeleted(count=deleted))
        pause = _ROUND_SECONDS if last is None else 0.0
        await self._database.attempt("put_job", SHARD, "retention", last, pause)
        return None if last is None else _PAUSE_SECONDS


async def prune_chunk(
    database: Database,
    after: UUID,
    *,
    keep: timedelta | None = None,
    name: str | None = None,
    dry_run: bool = False,
    most: int = CHUNK,
) -> tuple[UUID | None, int]:
    """Delete what is over for long enough among the next workflows; returns the last one looked at (None: that was
    all), and how many were (or would be) deleted.

    Args:
        database: Where.
        after: The last one that was looked at before.
        keep: How long they are kept, whatever anybody says.
        name: Only workflows of that name.
        dry_run: Count only.
        most: How many it looks at.
    """
    override = None if keep is None else keep.total_seconds()
    rows = await database.fetch("expired", SHARD, after, most, KEEP.total_seconds(), override, name)
    expired = [row.id for row in rows if row.is_expired]
    if expired and not dry_run:
        deleted = len(await database.fetch("delete_ended", SHARD, Uuids(expired)))
    else:
        deleted = len(expired)
    # All of them: ids are of their clients' clocks, and one that is slow would hide from us all that comes behind.
    at_end = len(rows) < most or all(row.is_recent for row in rows)
    return None if at_end else rows[-1].id, deleted
