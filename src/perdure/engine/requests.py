"""What others have for workflows that run here: a cancellation, a deadline, a message, an operator who resumes a
parked step.

Whoever has something writes it, and counts up `wakes` on the entry, in one statement. A hint (`workflow ID`) makes the
worker look at once. The truth is the heartbeat, which returns the sum of `wakes` over all entries that the worker
holds: where that isn't what the runs have seen, it looks at all of them. What it finds it no longer holds (terminated,
or taken over) ends here.
"""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

from perdure.engine.executor import Executor
from perdure.engine.leases import Lease
from perdure.engine.loop import Loop, Turns
from perdure.model.records import Message
from perdure.store.arrays import BigInts, Uuids
from perdure.store.database import Database
from perdure.store.statements import SHARD

_NEVER_SECONDS = 3600.0
_MOST = 500


class Requests(Loop):
    """Looks at the workflows that somebody has something for."""

    name = "requests"

    def __init__(
        self,
        database: Database,
        lease: Lease,
        executor: Executor,
        *,
        turns: Turns,
        on_children_wanted: Callable[[UUID], None],
    ) -> None:
        super().__init__(_NEVER_SECONDS, turns=turns)
        self._database = database
        self._lease = lease
        self._executor = executor
        self._on_children_wanted = on_children_wanted
        self._asked: dict[UUID, None] = {}

    def ask(self, id: UUID) -> None:
        """Somebody has something for that workflow, perhaps."""
        if id in self._executor.runs:
            self._asked[id] = None
            self.wake()

    def beat(self, wakes: int) -> None:
        """The heartbeat counted so many wakes."""
        runs = self._executor.runs
        if wakes != sum(run.seen for run in runs.values()):
            self._asked.update(dict.fromkeys(runs))
            self.wake()

    @property
    def is_at_rest(self) -> bool:
        """Whether there is nothing that it knows of and hasn't looked at."""
        return not self._asked

    async def tick(self) -> float | None:
        while self._asked and self._lease.is_valid:
            ids = list(self._asked)[:_MOST]
            for id in ids:
                del self._asked[id]  # who asks from now on may have something newer
            try:
                async with self.turns.turn():
                    await self._look(ids)
            except BaseException:
                self._asked.update(dict.fromkeys(ids))
                raise
        self._asked.clear()
        return None

    async def _look(self, ids: list[UUID]) -> None:
        worker_id = self._lease.worker_id
        runs = {
            id: run for id in ids if (run := self._executor.runs.get(id)) is not None and run.worker_id == worker_id
        }
        if not runs:
            return
        waiting = {id: run.waits.of("operator") for id, run in runs.items()}
        known = BigInts(run.inbox.after for run in runs.values())
        rows = await self._database.attempt("requests", SHARD, worker_id, Uuids(runs), known)
        found: dict[UUID, int] = {}
        requests: dict[UUID, dict[str, str]] = {}
        messages: dict[UUID, list[Message]] = {}
        parked: dict[UUID, set[str]] = {}
        for row in rows:
            found[row.workflow_id] = row.wakes if row.epoch == runs[row.workflow_id].epoch else -1
            if row.kind == "request":
                requests.setdefault(row.workflow_id, {})[row.key] = row.payload
            elif row.kind == "message":
                messages.setdefault(row.workflow_id, []).append(Message(row.place, row.key, row.payload, row.question))
            elif row.kind == "park":
                parked.setdefault(row.workflow_id, set()).add(row.key.rpartition("#a")[0])
        for id, run in runs.items():
            if self._executor.runs.get(id) is not run or run.over:
                continue
            wakes = found.get(id, -1)
            if wakes >= 0:
                if run.waits.has("child"):
                    self._on_children_wanted(id)  # before it counts as seen
                sent = sorted(messages.get(id, ()))
                run.look(wakes, requests.get(id, {}), sent, frozenset(parked.get(id, ())), waiting[id])
            elif not run.waits.frozen:  # else its suspension is under way, and will tell
                self._executor.drop([id], "an operator or another worker has taken it")
