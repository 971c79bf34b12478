"""What workflow code uses instead of the clock, chance and ad-hoc functions, so that a replay sees the same."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from random import Random
from secrets import randbits
from typing import Any
from uuid import UUID

from perdure.authoring.context import required
from perdure.authoring.steps import Step
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


async def run_step(name: str, fn: Callable[..., Any], /, *args: Any, retry: Retry | None = None, **kwargs: Any) -> Any:
    """Call any function as a step of that name: what `@step` does, for code that isn't yours to decorate."""
    context = required("run_step()")
    return await context.call(Step(fn, name=name, retry=retry), args, kwargs)
