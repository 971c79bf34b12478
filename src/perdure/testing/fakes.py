"""Stand-ins for steps: what a step does in a test instead of its body."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Self

from perdure.authoring.steps import Step
from perdure.model.unset import UNSET, Unset

_stand_ins: dict[Step[..., Any], list[Fake]] = {}
_bodies: dict[Step[..., Any], tuple[Any, ...]] = {}


class Called(NamedTuple):
    """How a fake was called."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Fake:
    """Takes the place of a step's body, from `fake(...)` until the end of its block, or until `restore()`.

    Attributes:
        calls: How it was called, in order: each with `args` and `kwargs`.
    """

    def __init__(
        self,
        step: Step[..., Any],
        *,
        returns: Any = UNSET,
        raises: BaseException | type[BaseException] | None = None,
        calls: Callable[..., Any] | None = None,
    ) -> None:
        given = [not isinstance(returns, Unset), raises is not None, calls is not None]
        if given.count(True) > 1:
            raise TypeError(f"fake({step.name}) takes one of returns=, raises= and calls=")
        self.calls: list[Called] = []
        self._returns = None if isinstance(returns, Unset) else returns
        self._raises = raises
        self._function = calls
        if step.is_bound:
            raise TypeError(
                f"fake() got step {step.name!r} of an instance, which is another one at each access; give the class's"
            )
        self._step = step
        _ = step.parameters, step.shape  # of the body's signature, and kept from now on
        _bodies.setdefault(step, (step.fn, step.is_async, step.transaction))
        _stand_ins.setdefault(step, []).append(self)

        @functools.wraps(_bodies[step][0])  # whoever asks for its annotations, or for the version of the code
        async def stand_in(*args: Any, **kwargs: Any) -> Any:
            return await self._called(args, kwargs)

        self._stand_in = stand_in
        step.fn, step.is_async, step.transaction = stand_in, True, None

    async def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.calls.append(Called(args, kwargs))
        if self._raises is not None:
            raise self._raises
        if self._function is None:
            return self._returns
        value = self._function(*args, **kwargs)
        return await value if inspect.isawaitable(value) else value

    def restore(self) -> None:
        """The step does what it did, or what a later stand-in says; once more does nothing."""
        step, others = self._step, _stand_ins.get(self._step, [])
        if self not in others:
            return
        others.remove(self)
        if others:
            step.fn = others[-1]._stand_in
        else:
            del _stand_ins[step]
            step.fn, step.is_async, step.transaction = _bodies.pop(step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def fake(
    step: Step[..., Any],
    *,
    returns: Any = UNSET,
    raises: BaseException | type[BaseException] | None = None,
    calls: Callable[..., Any] | None = None,
) -> Fake:
    """Let a step do something else than its body: `with fake(charge, returns="payment-1") as charged: ...`.

    It is recorded, tried again and replayed like the step itself; a transactional step needs no connection.

    Args:
        step: Which.
        returns: What it returns; by default None.
        raises: What it raises, each time.
        calls: What is called in its place, with its arguments; `def` or `async def`.
    """
    return Fake(step, returns=returns, raises=raises, calls=calls)
