"""`saga`: what was done is undone, in reverse, where the rest fails.

Compensations are steps like any other: recorded, replayed, and gone on with after a crash in the middle of them. They
are registered by plain code, which a replay runs again, so nothing of a saga needs to be stored.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any, ParamSpec, Protocol, Self, cast

from perdure.authoring.steps import OnExhausted, Step
from perdure.errors import RunEnded
from perdure.model.retry import Retry

P = ParamSpec("P")

_RETRY = Retry(max_attempts=5, initial=timedelta(seconds=1), maximum=timedelta(minutes=5))


class Saga(Protocol):
    """What `saga()` gives its block."""

    def compensate(self, step: Callable[P, Awaitable[Any]], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """If the block fails from now on, call this step, with these arguments; later ones are called first."""
        ...


def saga(*, retry: Retry = _RETRY, on_exhausted: OnExhausted = "park") -> AbstractAsyncContextManager[Saga]:
    """A block whose work is undone if it fails, is cancelled, or its workflow's time is over.

    `async with saga() as s: seat = await reserve(42); s.compensate(release, seat)`: when an error leaves the block,
    the compensations run one after the other, in reverse; then the error goes on.

    Args:
        retry: How often a compensation is tried whose step has no `retry=` of its own.
        on_exhausted: What to do when its attempts are used up: "park" it for an operator, who resumes the workflow; or
            "fail": the others still run, and then what it failed with goes on, from the error that left the block. A
            step that says `on_exhausted="park"` itself is parked in any case.
    """
    return _Saga(retry, on_exhausted)


class _Saga:
    def __init__(self, retry: Retry, on_exhausted: OnExhausted) -> None:
        self._retry = retry
        self._on_exhausted: OnExhausted = on_exhausted
        self._compensations: list[Callable[[], Awaitable[Any]]] = []

    def compensate(self, step: Callable[P, Awaitable[Any]], /, *args: P.args, **kwargs: P.kwargs) -> None:
        if not callable(step):
            raise TypeError(
                f"compensate() takes a step and its arguments, not {type(step).__name__}; write "
                "compensate(refund, payment), without calling the step"
            )
        self._compensations.append(partial(self._with_policy(step), *args, **kwargs))

    def _with_policy(self, step: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        if not isinstance(step, Step):
            return step
        given = cast("Step[..., Any]", step)
        guarded = given.with_options(retry=given.retry or self._retry)
        guarded.is_async = given.is_async
        if self._on_exhausted == "park":
            guarded.on_exhausted = "park"
        return guarded

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, RunEnded | GeneratorExit):
            return  # the latter: this run of it is over, and another one will come by here
        failure: Exception | None = None
        while self._compensations:
            compensation = self._compensations.pop()
            try:
                await compensation()
            except Exception as other:
                failure = failure or other
        if failure is not None:
            raise failure from error
