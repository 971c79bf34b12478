"""`map`: one call for each item, a few at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextvars import copy_context
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
    left = enumerate(items)
    here = copy_context()  # the tasks are siblings, whoever has made room for them
    failed = False

    async def call(number: int, item: Item) -> None:
        nonlocal failed
        try:
            results[number] = await fn(item)
        except BaseException:
            failed = True
            raise
        begin()

    def begin() -> bool:
        if failed or (following := next(left, None)) is None:
            return False
        number, item = following
        here.run(group.create_task, call(number, item), name=f"map[{number}]")
        return True

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                if not begin():
                    break
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [results[number] for number in range(len(results))]
