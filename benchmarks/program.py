"""What perdure runs in the measurements: workflows that do nothing, so that only the engine is measured."""

from __future__ import annotations

import os
import time

from perdure import App, step

SCHEMA = "BENCHMARK_SCHEMA"
TEXT = "x" * 98
"""An argument, and a result: 100 bytes of JSON."""

app = App("benchmarks", schema=os.environ.get(SCHEMA, "benchmarks"))


@step
async def echo(text: str) -> str:
    return text


@step
async def clock() -> int:
    """The monotonic clock of the machine, which all its processes share, in ns."""
    return time.monotonic_ns()


@app.workflow
async def one_step(text: str) -> str:
    return await echo(text)


@app.workflow
async def timed() -> int:
    return await clock()


@app.workflow
async def many_steps(count: int) -> list[int]:
    return [await clock() for _ in range(count)]
