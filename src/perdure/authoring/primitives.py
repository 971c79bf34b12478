"""What workflow code uses instead of the clock, chance and ad-hoc functions, so that a replay sees the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from datetime import datetime, timedelta
from random import Random
from secrets import randbits
from typing import Any
from uuid import UUID

from perdure.authoring.context import required
from perdure.authoring.steps import Step
from perdure.model.keys import check_name
from perdure.model.retry import Retry


def now() -> datetime:
    """The time (aware, UTC, by the database's clock), recorded: a replay gets the same instant."""
    context = required("now()", "use datetime.now(UTC) elsewhere")
    return datetime.fromisoformat(context.value("now", context.time))


def random() -> Random:
    """A generator of random numbers whose seed is recorded: a replay draws the same numbers."""
    return Random(required("random()", "use random.Random() elsewhere").value("random", lambda: str(randbits(128))))


def uuid4() -> UUID:
    """A random UUID, recorded: a replay gets the same one."""
    value = required("uuid4()", "use uuid.uuid4() elsewhere").value(
        "uuid4", lambda: str(UUID(int=randbits(128), version=4))
    )
    return UUID(value)


async def sleep(delay: timedelta, /) -> None:
    """Wait, durably:

    over crashes and deploys, never less than `delay`. A workflow that waits for long leaves memory.
    """
    context = required("sleep()", "use asyncio.sleep() or time.sleep() elsewhere")
    if not isinstance(delay, timedelta):
        raise TypeError(f"sleep() takes a timedelta, not {type(delay).__name__}; write sleep(timedelta(seconds=...))")
    await context.sleep("sleep", lambda: delay)


async def sleep_until(when: datetime, /) -> None:
    """Wait, durably, until that instant by the database's clock; an instant in the past is no wait."""
    context = required("sleep_until()", "use asyncio.sleep() or time.sleep() elsewhere")
    if when.tzinfo is None:
        raise ValueError(f"sleep_until() got {when!r}, which has no time zone; use an aware datetime")
    await context.sleep("sleep_until", lambda: when - datetime.fromisoformat(context.time()))


def timeout(delay: timedelta | None, /) -> AbstractAsyncContextManager[Any]:
    """A durable limit of time: `async with timeout(timedelta(hours=1)): ...` cancels its block and raises TimeoutError.

    What `asyncio.timeout` is for, by the database's clock, and with a place among the outcomes, so that a replay times
    out at the same point. Its `expired` says whether the time ran out. None: no limit.
    """
    return required("timeout()", "use asyncio.timeout() elsewhere").limit(delay)


def patched(name: str, /) -> bool:
    """Whether this workflow takes the new path at a change of the code.

    True for workflows that had not come so far when the change was deployed (that is recorded); False for those that
    replay past this point what older code has recorded. When none of those is left, the old path can go.

    Args:
        name: What the change is called; the answer is the same wherever the workflow asks for it.
    """
    return required("patched()", "it says which of two paths a workflow's history is of").patched(
        check_name("patch", name)
    )


async def run_step(name: str, fn: Callable[..., Any], /, *args: Any, retry: Retry | None = None, **kwargs: Any) -> Any:
    """Call any function as a step of that name: what `@step` does, for code that isn't yours to decorate."""
    context = required("run_step()")
    return await context.call(Step(fn, name=name, retry=retry), args, kwargs)
