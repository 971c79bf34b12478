"""The replay gate: whether the code at hand can go on with what is in a database. It only reads.

Histories are read in batches, each in one snapshot, and replayed one after the other (engine/replays.py), while workers
of any version go on with them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import datetime
from uuid import UUID

from perdure.app import App
from perdure.engine.replays import Replays
from perdure.model.keys import RESULT
from perdure.model.records import Recorded, WorkflowInfo
from perdure.model.replay import History, Replayed
from perdure.store.arrays import Uuids
from perdure.store.statements import SHARD

_BATCH = 50


async def replay(app: App, workflows: AsyncIterator[WorkflowInfo]) -> AsyncIterator[Replayed]:
    """Replay these with the app's code; workflows whose names it doesn't know are passed over."""
    runner = replays(app)
    with runner.installed():
        async for batch in _batches(workflows):
            known = [workflow for workflow in batch if workflow.name in app.workflow_functions]
            for history in await histories(app, known):
                yield await runner.replay(history)


def replays(app: App) -> Replays:
    """What replays workflows of that app, on this event loop."""
    return Replays(
        workflows=app.workflow_functions,
        catalogue=app.catalogue,
        codec=app.codec,
        max_payload=app.settings.max_payload,
        version=app.version,
    )


async def histories(app: App, workflows: Sequence[WorkflowInfo]) -> list[History]:
    """What these have recorded. One that is gone meanwhile is left out."""
    rows = await app.session().database.fetch("load", SHARD, Uuids([workflow.id for workflow in workflows]))
    recorded: dict[UUID, list[Recorded]] = {}
    for row in rows:
        recorded.setdefault(row.workflow_id, []).append(Recorded(*row[1:]))
    return [
        history_of(app, workflow.id, workflow.name, recorded[workflow.id], workflow.deadline)
        for workflow in workflows
        if workflow.id in recorded
    ]


def history_of(app: App, id: UUID, name: str, recorded: Iterable[Recorded], deadline: datetime | None) -> History:
    """A workflow's rows as a history."""
    outcomes: list[Recorded] = []
    result: Recorded | None = None
    for each in recorded:
        if each.key != RESULT:
            outcomes.append(each)
        elif each.status == "success":
            result = each._replace(payload=app.decoded(each.payload or "null"))
        else:
            result = each
    return History(workflow_id=id, name=name, outcomes=tuple(outcomes), result=result, deadline=deadline)


async def _batches(workflows: AsyncIterator[WorkflowInfo]) -> AsyncIterator[list[WorkflowInfo]]:
    batch: list[WorkflowInfo] = []
    async for workflow in workflows:
        batch.append(workflow)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
