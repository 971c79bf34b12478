"""`as_completed`: the results of several calls as they come, in an order that a replay repeats."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class _Completed(AsyncIterator[T], Generic[T]):
    def __init__(self, calls: Iterable[Awaitable[T]]) -> None:
        self._ended: asyncio.Queue[asyncio.Future[T]] = asyncio.Queue()
        self._tasks = [asyncio.ensure_future(call) for call in calls]  # a list: their order is their identity
        self._left = len(self._tasks)
        for task in self._tasks:
            task.add_done_callback(self._ended.put_nowait)

    async def __anext__(self) -> T:
        if self._left == 0:
            raise StopAsyncIteration
        ended = await self._ended.get()
        self._left -= 1
        return ended.result()


def as_completed(calls: Iterable[Awaitable[T]], /) -> AsyncIterator[T]:
    """Run calls at the same time, and get their results as they come: `async for result in as_completed(calls): ...`.

    What `asyncio.as_completed` is for, with an order that a replay repeats. A call that fails raises its error at its
    turn; the others go on.

    Args:
        calls: Step calls, coroutines or tasks.
    """
    return _Completed(calls)
