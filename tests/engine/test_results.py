"""Results, and those who wait for them."""

from __future__ import annotations

import asyncio

from perdure.model.records import Result
from perdure.results import Results

from .support import FaultyDatabase, Sql, start

INSERT = (
    "INSERT INTO checkpoints (shard, workflow_id, key, kind, position, status, payload, created_at) "
    "VALUES (1, %s, '$result', 'result', 2147483647, 'success', %s, now())"
)


async def test_who_waits_since_a_workflow_began_anew_does_not_get_what_it_came_to_before(
    database: FaultyDatabase, sql: Sql
) -> None:
    """The look that is under way was sent before; its answer comes late."""
    (id,) = await start(database)
    sql(INSERT, id, "1")
    results = Results(database, say_waiting=lambda: None, hears=lambda: True)
    late = database.hold_answer("results", with_rows=True)
    first = asyncio.ensure_future(results.wait(id, is_known=True))
    async with asyncio.timeout(20):
        await late.happened.wait()
        results.deliver(Result(id, "success", "1"))  # by a worker that lives here
        assert (await first).payload == "1"
        sql("DELETE FROM checkpoints WHERE workflow_id = %s AND key = '$result'", id)
        second = asyncio.ensure_future(results.wait(id, is_known=True))
        await asyncio.sleep(0)
        late.leave.set()
        sql(INSERT, id, "2")
        assert (await second).payload == "2"
    await results.close()
