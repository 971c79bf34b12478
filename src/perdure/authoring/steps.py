"""`@step`: a function whose outcome is recorded, so that it isn't called again."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Concatenate, Generic, Literal, Never, ParamSpec, Protocol, TypeVar, cast, overload

from perdure.authoring.context import CURRENT
from perdure.codec import Shape, result_shape
from perdure.model.keys import check_name
from perdure.model.retry import Retry
from perdure.model.unset import UNSET, Unset

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")
Q = ParamSpec("Q")
Match = Literal["args", "name"]
OnExhausted = Literal["fail", "park"]
InDoubt = Literal["rerun", "park"] | Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transaction:
    """What makes a step transactional: its connection comes from here, as its first argument.

    Attributes:
        using: Makes a connection to the app's database, as an async context manager; `pool.connection`, for instance.
        isolation: The isolation level ("serializable", ...); None: the connection's default.
    """

    using: Callable[[], AbstractAsyncContextManager[Any]]
    isolation: str | None = None


class Step(Generic[P, R]):
    """A checkpointed call: inside a workflow its outcome is recorded, elsewhere it is a plain call.

    Attributes:
        name: What its checkpoints are called.
        fn: The undecorated function.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        name: str | None = None,
        retry: Retry | None = None,
        timeout: timedelta | None = None,
        raises: tuple[type[Exception], ...] = (),
        match: Match = "args",
        pure: bool = False,
        idempotent: bool = False,
        on_exhausted: OnExhausted = "fail",
        in_doubt: InDoubt = "rerun",
        transaction: Transaction | None = None,
    ) -> None:
        if not callable(fn):
            raise TypeError(f"@step takes a function, not {type(fn).__name__}; write @step or @step(name=...)")
        if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
            raise TypeError(f"step {_name_of(fn)!r} is a generator; a step returns one value, so collect it in a list")
        if timeout is not None and timeout <= timedelta(0):
            raise ValueError(f"timeout={timeout} of step {_name_of(fn)!r} leaves no time; use more than 0")
        if on_exhausted not in ("fail", "park"):
            raise ValueError(f"on_exhausted={on_exhausted!r} of step {_name_of(fn)!r} is none; use 'fail' or 'park'")
        _check_in_doubt(_name_of(fn), in_doubt, pure=pure)
        functools.update_wrapper(self, fn)
        self.fn: Callable[P, Any] = fn
        self.name = check_name("step", name or _name_of(fn))
        self.retry = retry
        self.timeout = timeout
        self.raises = raises
        self.match: Match = match
        self.pure = pure
        self.idempotent = idempotent or pure or transaction is not None
        self.on_exhausted: OnExhausted = on_exhausted
        self.in_doubt: InDoubt = in_doubt
        self.transaction = transaction
        self.is_async = inspect.iscoroutinefunction(fn)
        self.is_bound = False

    @functools.cached_property
    def shape(self) -> Shape:
        """How its result becomes JSON, by its return annotation."""
        return result_shape(self.fn)

    @functools.cached_property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters that a positional argument can go to."""
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        try:
            signature = inspect.signature(self.fn)
        except (TypeError, ValueError):
            return ()
        names = tuple(name for name, parameter in signature.parameters.items() if parameter.kind in kinds)
        return names if self.transaction is None else names[1:]

    @functools.cached_property
    def where(self) -> str:
        """What its result is called in an error."""
        return f"the result of step {self.name!r}"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[object, Never, R]:
        context = CURRENT.get()
        call = direct(self, args, kwargs) if context is None else context.call(self, args, kwargs)
        return cast("Coroutine[object, Never, R]", call)

    def with_options(
        self,
        *,
        retry: Retry | Unset | None = UNSET,
        timeout: timedelta | Unset | None = UNSET,
        name: str | None = None,
    ) -> Step[P, R]:
        """The same step with some options replaced."""
        options: Step[P, R] = Step(
            self.fn,
            name=name or self.name,
            retry=self.retry if isinstance(retry, Unset) else retry,
            timeout=self.timeout if isinstance(timeout, Unset) else timeout,
            raises=self.raises,
            match=self.match,
            pure=self.pure,
            idempotent=self.idempotent,
            on_exhausted=self.on_exhausted,
            in_doubt=self.in_doubt,
            transaction=self.transaction,
        )
        return options

    @overload
    def __get__(self, instance: None, owner: type[Any]) -> Step[P, R]: ...
    @overload
    def __get__(self: Step[Concatenate[S, Q], R], instance: S, owner: type[Any] | None = ...) -> Step[Q, R]: ...
    def __get__(self, instance: Any, owner: type[Any] | None = None) -> Any:
        """On an instance: the step with that instance as its first argument."""
        if instance is None:
            return self
        bound = self.with_options()
        bound.fn = cast("Any", functools.partial(self.fn, instance))
        if callable(self.in_doubt):
            bound.in_doubt = functools.partial(self.in_doubt, instance)
        bound.is_async = self.is_async
        bound.is_bound = True
        bound.__dict__["shape"] = self.shape
        return bound

    def __repr__(self) -> str:
        return f"<step {self.name}>"


def _check_in_doubt(name: str, in_doubt: object, *, pure: bool) -> None:
    if not (in_doubt in ("rerun", "park") or inspect.iscoroutinefunction(in_doubt)):
        raise ValueError(f"in_doubt={in_doubt!r} of step {name!r} is none; use 'rerun', 'park' or an async def")
    if pure and in_doubt != "rerun":
        raise ValueError(f"step {name!r} is pure, so it is never in doubt; leave out in_doubt= or pure=")


def direct(step: Step[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Coroutine[Any, Any, Any]:
    """The call without a workflow around it: no checkpoint, no retry; a `def` step runs in a thread all the same."""
    if step.transaction is not None:
        return _in_transaction(step.transaction, step.fn, args, kwargs)
    if step.is_async:
        return cast("Coroutine[Any, Any, Any]", step.fn(*args, **kwargs))
    return _in_thread(step.fn, args, kwargs)


async def _in_thread(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    context = contextvars.copy_context()
    value = await asyncio.to_thread(context.run, functools.partial(fn, *args, **kwargs))
    return await value if inspect.isawaitable(value) else value


async def _in_transaction(
    transaction: Transaction, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    async with transaction.using() as connection, connection.transaction():
        return await fn(connection, *args, **kwargs)


def _name_of(fn: Callable[..., Any]) -> str:
    return str(getattr(fn, "__name__", type(fn).__name__))


class StepDecorator(Protocol):
    """What `@step(...)` gives: applied to an `async def` or a `def`."""

    @overload
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> Step[P, R]: ...
    @overload
    def __call__(self, fn: Callable[P, R], /) -> Step[P, R]: ...


@overload
def step(fn: Callable[P, Coroutine[Any, Any, R]], /) -> Step[P, R]: ...
@overload
def step(fn: Callable[P, R], /) -> Step[P, R]: ...
@overload
def step(
    *,
    name: str = ...,
    retry: Retry | None = None,
    timeout: timedelta | None = None,
    raises: tuple[type[Exception], ...] = (),
    match: Match = "args",
    pure: bool = False,
    idempotent: bool = False,
    on_exhausted: OnExhausted = "fail",
    in_doubt: InDoubt = "rerun",
) -> StepDecorator: ...
def step(fn: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Make a function a step: inside a workflow its outcome is recorded once, and replayed from then on.

    A `def` runs in a thread; both are awaited.

    Args:
        name: What its checkpoints are called; by default the function's name.
        retry: When it is tried again; None: one attempt.
        timeout: How long one attempt may take (`StepTimeout`).
        raises: Errors that the workflow's code gets as themselves.
        match: "args": a replay with other arguments is an error; "name": arguments may differ.
        pure: It has no effects, so it needn't wait until what came before it is durable.
        idempotent: Running it again, after a crash, does no harm; `perdure.testing.crash_everywhere` lists those of
            which nobody says so.
        on_exhausted: What happens when its last attempt has failed, the last that `retry` allows or one with an error
            that isn't retried: "fail" raises in the workflow; "park" lets the workflow wait for an operator, who sees
            to the cause and resumes it.
        in_doubt: What happens to an attempt that a crash cut short, so that nobody knows whether it took effect.
            "rerun": the step runs again. "park": the workflow waits for an operator. An `async def`: it is called with
            the step's arguments, and finds the same `current().idempotency_key`; what it returns is the step's outcome,
            and `raise Rerun` says that there was no effect, so that the step runs. The last two cost a write before
            each attempt.
    """

    def declare(fn: Callable[..., Any]) -> Step[..., Any]:
        declared: Step[..., Any] = Step(fn, **options)
        return declared

    return declare if fn is None else declare(fn)
