"""The threads in which `def` steps run: a bounded pool."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Threads:
    """Runs plain functions off the event loop, each in a copy of the caller's context."""

    def __init__(self, size: int) -> None:
        self._pool = ThreadPoolExecutor(size, thread_name_prefix="perdure-step")

    def submit(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> asyncio.Future[Callable[[], Any]]:
        """A future of what gives the outcome: called, it returns the value, or raises what the function raised.

        Futures can't carry every exception (`StopIteration`), nor should every one end a process (`SystemExit`).
        Abandoned, the function goes on to its end; nobody is told what came of it.
        """
        context = contextvars.copy_context()
        return asyncio.get_running_loop().run_in_executor(self._pool, lambda: context.run(_outcome, fn, args, kwargs))

    def close(self) -> None:
        """No new calls; those that run are not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _outcome(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any]:
    try:
        value = fn(*args, **kwargs)
    except BaseException as error:
        failure = error

        def fail() -> Any:
            raise failure

        return fail
    return lambda: value
