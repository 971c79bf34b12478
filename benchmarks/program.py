"""What perdure runs in the measurements: workflows that do nothing, so that only the engine is measured."""

from __future__ import annotations

import asyncio
import os
import time
from datetime import timedelta

import perdure
from perdure import App, answering, recv, sleep, step, write_stream

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


@step(pure=True)
async def number(n: int) -> int:
    return n


@step
async def hold() -> None:
    await asyncio.Event().wait()


@app.workflow
async def one_step(text: str) -> str:
    return await echo(text)


@app.workflow
async def echo_back(text: str) -> str:
    return text


@app.workflow
async def pure_steps(count: int) -> float:
    """How many pure steps a second, one after the other."""
    began = time.perf_counter()
    for n in range(count):
        await number(n)
    return count / (time.perf_counter() - began)


@app.workflow
async def timed() -> int:
    return await clock()


@app.workflow
async def many_steps(count: int) -> list[int]:
    return [await clock() for _ in range(count)]


@app.workflow
async def nap(seconds: float) -> int:
    await sleep(timedelta(seconds=seconds))
    return await clock()


@app.workflow
async def listen() -> int:
    await recv("go")
    return await clock()


@app.workflow
async def stand_still() -> None:
    await hold()


@app.workflow
async def remember(count: int) -> int:
    """So many recorded steps, a sleep out of memory, and one step more."""
    for n in range(count):
        await number(n)
    await sleep(timedelta(seconds=1.5))
    return await clock()


@app.job
async def job(n: int) -> int:
    return 1


@app.workflow
async def fan_out(count: int, way: str) -> int:
    if way == "map":
        return sum(await perdure.map(job, range(count), concurrency=1000))
    return sum(await asyncio.gather(*(job(n) for n in range(count))))


FAMILY = 20


@app.workflow
async def family(text: str) -> int:
    return sum(await asyncio.gather(*(job(n) for n in range(FAMILY))))


@app.workflow
async def answers(count: int) -> None:
    for _ in range(count):
        async with answering("number", type=int) as question:
            question.reply(question.value)


@step
async def write_words(count: int) -> None:
    for _ in range(count):
        await write_stream("words", "hello")


@app.workflow
async def talk(count: int) -> None:
    await write_words(count)
