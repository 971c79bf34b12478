"""A step that takes long is visible while it runs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from acceptance.support import Gate
from perdure import App, step


async def test_a_step_that_runs_for_longer_than_a_heartbeat_stands_in_the_view(
    app: App, sql: Callable[..., list[Any]]
) -> None:
    gate = Gate()

    @step
    async def slow() -> str:
        await gate.passed()
        return "done"

    @app.workflow
    async def flow() -> str:
        return await slow()

    async with app.worker(lease=timedelta(seconds=1)):
        handle = await app.start(flow())
        await gate.reached()
        beat = sql("SELECT heartbeat_at FROM workers")[0][0]
        shown: list[Any] = []
        while not shown:  # it is written with a heartbeat, which each round waits for
            while sql("SELECT heartbeat_at FROM workers")[0][0] == beat:
                await app.session().database.attempt("clock")
            beat = sql("SELECT heartbeat_at FROM workers")[0][0]
            shown = sql("SELECT key, status, attempts, completed_at FROM workflow_steps")
        assert shown == [("slow", "running", 1, None)]
        gate.open()
        assert await handle.result() == "done"
        assert sql("SELECT key, status FROM workflow_steps") == [("slow", "success")]
