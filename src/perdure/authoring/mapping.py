"""`map`: one call for each item, a few at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")
R = TypeVar("R")


async def map(fn: Callable[[Item], Awaitable[R]], items: Iterable[Item], /, *, concurrency: int) -> list[R]:
    """Call `fn` with each item, `concurrency` of them at the same time, and return what they gave, in order.

    Each call is a task of its own, so steps in it have the same keys whichever ends first. The first that fails cancels
    those that run, no other begins, and its error is raised.

    Args:
        fn: A step, or a coroutine function.
        items: One argument each; taken as calls begin, so it may be long.
        concurrency: How many calls may be under way.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency={concurrency} calls nothing; use 1 or more")
    results: dict[int, R] = {}
    running: dict[asyncio.Task[R], int] = {}
    ended: asyncio.Queue[asyncio.Task[R]] = asyncio.Queue()  # `asyncio.wait` would look at all of them for each
    left = enumerate(items)
    try:
        while True:
            while len(running) < concurrency and (following := next(left, None)) is not None:
                number, item = following
                task = asyncio.create_task(_call(fn, item), name=f"map[{number}]")
                task.add_done_callback(ended.put_nowait)
                running[task] = number
            if not running:
                return [results[number] for number in range(len(results))]
            task = await ended.get()
            results[running.pop(task)] = task.result()
    finally:
        for task in running:
            task.cancel()
        if running:
            await asyncio.gather(*running, return_exceptions=True)


async def _call(fn: Callable[[Item], Awaitable[R]], item: Item) -> R:
    return await fn(item)
