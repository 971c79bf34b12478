"""Replay of a workflow with 1 000 recorded steps: from when it is woken to its next step.

That is the claim, the loading of its history, and the replay: the workflow has slept, and left memory.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from benchmarks.bench import Bench
from benchmarks.figures import Figure
from benchmarks.program import app, remember
from perdure import telemetry

CHECKPOINTS = 1000


def measure(bench: Bench) -> list[Figure]:
    """In this process, which hears the events of its worker."""
    return [
        Figure(
            name=f"{CHECKPOINTS:,} checkpoints, p50 of {bench.repeats * 5}",
            unit="ms",
            values=asyncio.run(_replays(bench)),
            target=100,
            better="less",
        )
    ]


async def _replays(bench: Bench) -> list[float]:
    woken, times = 0.0, list[float]()

    def hear(event: telemetry.Event) -> None:
        nonlocal woken
        if isinstance(event, telemetry.WorkflowsWoken):
            woken = time.perf_counter()
        elif isinstance(event, telemetry.StepStarted) and event.key == "clock":
            times.append((time.perf_counter() - woken) * 1000)

    unsubscribe = telemetry.subscribe(hear)
    move_back = app.move(replace(app.settings, database_url=bench.cluster.url, schema=bench.fresh_schema()))
    try:
        async with app, app.worker():
            for _ in range(bench.repeats * 5):
                await app.run(remember(CHECKPOINTS))
    finally:
        move_back()
        unsubscribe()
    return times
