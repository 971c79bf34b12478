"""The threads in which `def` steps run: a bounded pool."""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Threads:
    """Runs plain functions off the event loop, each in a copy of the caller's context."""

    def __init__(self, size: int) -> None:
        self._pool = ThreadPoolExecutor(size, thread_name_prefix="perdure-step")

    def submit(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> asyncio.Future[Any]:
        """A future of the call. Abandoned, it goes on to its end; nobody is told what came of it."""
        context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._pool, context.run, functools.partial(fn, *args, **kwargs))
        future.add_done_callback(_retrieve)
        return future

    def close(self) -> None:
        """No new calls; those that run are not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _retrieve(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()
