"""How children ended, for the runs of this worker that wait for them: read from the database.

A child that ran here tells by itself. All others are looked for: when a run begins to wait for one that it didn't start
in this breath, and when somebody has counted up its wakes. A run doesn't leave memory while it is to be looked for
(`Children.is_looked_for`): what it would wait for may be there already, and its note long gone.

Ten thousand children that run elsewhere end one by one, and each look reads about all that are left. So looks for a run
keep a distance that grows with the time that they take: they take no more than a twentieth of it.
"""

from __future__ import annotations

import asyncio
from uuid import UUID

from perdure.engine.children import Ended, missing
from perdure.engine.executor import Executor
from perdure.engine.loop import Loop, Turns
from perdure.engine.run import Run
from perdure.store.arrays import Uuids
from perdure.store.database import Database
from perdure.store.statements import SHARD

_NEVER_SECONDS = 3600.0
_MOST = 1000
_DISTANCE = 20


class ChildResults(Loop):
    """Looks for the results of children."""

    name = "child results"

    def __init__(self, database: Database, executor: Executor, *, turns: Turns) -> None:
        super().__init__(_NEVER_SECONDS, turns=turns)
        self._database = database
        self._executor = executor
        self._asked: dict[UUID, None] = {}
        self._not_before: dict[UUID, float] = {}

    def ask(self, id: UUID) -> None:
        """That run waits for children that may have ended."""
        run = self._executor.runs.get(id)
        if run is not None and not run.over:
            run.children.is_looked_for = True
            self._asked[id] = None
            self.wake()

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing is to be looked for."""
        return not self._asked

    async def tick(self) -> float | None:
        now = asyncio.get_running_loop().time()
        self._not_before = {id: at for id, at in self._not_before.items() if at > now}
        for id in [id for id in self._asked if id not in self._not_before]:
            del self._asked[id]
            run = self._executor.runs.get(id)
            if run is None or run.over:
                continue
            try:
                await self._look(run)
            except BaseException:
                self._asked[id] = None
                raise
        soonest = min((self._not_before[id] for id in self._asked if id in self._not_before), default=None)
        if soonest is not None:
            return max(0.0, soonest - now)
        return 0.0 if self._asked else None

    async def _look(self, run: Run) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        awaited = run.children.look()
        for first in range(0, len(awaited), _MOST):
            ids = awaited[first : first + _MOST]
            rows = {row.id: row for row in await self._database.attempt("child_results", SHARD, Uuids(ids))}
            for id in ids:
                if id not in rows:
                    run.child_ended(id, missing(id))
                elif rows[id].status is not None:
                    run.child_ended(id, Ended(rows[id].status, rows[id].payload))
        ended = loop.time()
        self._not_before[run.id] = ended + _DISTANCE * (ended - began) if len(awaited) > _MOST else ended
        run.children.looked(again=run.id in self._asked)
        run.consider()
