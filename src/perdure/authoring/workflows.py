"""`@workflow`: a function that goes on after a crash; called, it makes an invocation that a verb can start."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Coroutine, Generator
from datetime import timedelta
from types import MethodType
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, overload

from typing_extensions import TypeVar

from perdure.annotations import ANY, hints_of
from perdure.authoring.context import CURRENT
from perdure.codec import Shape, result_shape
from perdure.errors import WrongPlace
from perdure.model.keys import check_name
from perdure.model.retry import Retry
from perdure.model.unset import UNSET, Unset
from perdure.parameters import Parameters, dump_untyped

P = ParamSpec("P")
Q = ParamSpec("Q")
S = TypeVar("S")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True, default=Any)
V = TypeVar("V", bound=Callable[..., Any])


class Invocation(Coroutine[Any, Any, R_co]):
    """A workflow called with its arguments: give it to a verb (`app.start`, `app.run`, ...).

    It is a coroutine to asyncio and to type checkers. One that no verb ever gets warns when it is thrown away.
    """

    def __init__(self, name: str, /, *args: Any, **kwargs: Any) -> None:
        self.name = name
        self.args = args
        self.kwargs = kwargs
        self.workflow: Workflow[..., Any] | None = None
        self.__qualname__ = name  # what asyncio and task paths call it
        context = CURRENT.get()
        self.key = None if context is None else context.child_key(name)
        """Where a workflow's code made it: its place there."""
        self._context = None if self.key is None else context
        self._running: Coroutine[Any, Any, R_co] | None = None
        self._used = False

    def taken(self) -> None:
        """A verb has it now."""
        self._used = True

    def input(self, limit: int) -> str:
        """The arguments as JSON, checked against the signature where it is known."""
        if self.workflow is None:
            return dump_untyped(self.name, self.args, self.kwargs, limit)
        return self.workflow.parameters.dump(self.args, self.kwargs, limit)

    def send(self, value: Any, /) -> Any:
        return self._begun().send(value)

    def throw(self, *exc: Any) -> Any:
        return self._begun().throw(*exc)

    def close(self) -> None:
        self._used = True
        if self._running is not None:
            self._running.close()

    def __await__(self) -> Generator[Any, Any, R_co]:
        return self._begun().__await__()

    def _begun(self) -> Coroutine[Any, Any, R_co]:
        """The child that this is, awaited inside a workflow."""
        if self._running is None:
            if self._used:
                raise WrongPlace(f"{self!r} was given to a verb already; call the workflow again for another child")
            self._used = True
            context = CURRENT.get()
            if context is None:
                raise WrongPlace(
                    f"workflow {self.name!r} was awaited outside a workflow; use app.run(...) or app.start(...)"
                )
            self._running = context.child(self, self.key)
        return self._running

    def __del__(self) -> None:
        if not getattr(self, "_used", True) and (self._context is None or not self._context.has_ended):
            warnings.warn(
                f"workflow {self.name!r} was called but never started; use app.start(...) or app.run(...)",
                RuntimeWarning,
                stacklevel=2,
            )

    def __repr__(self) -> str:
        return f"<invocation of {self.name}>"


class Workflow(Generic[P, R]):
    """A workflow function; called, it makes an `Invocation`.

    Attributes:
        name: What its rows are called.
        fn: The undecorated function.
    """

    def __init__(
        self,
        fn: Callable[P, Coroutine[Any, Any, R]],
        *,
        name: str | None = None,
        queue: str = "default",
        timeout: timedelta | None = None,
        retry: Retry | None = None,
        retention: timedelta | Unset | None = UNSET,
        version: str | None = None,
    ) -> None:
        if not inspect.iscoroutinefunction(fn):
            raise TypeError(
                f"workflow {getattr(fn, '__name__', fn)!r} is no 'async def'; make it one (or use @app.job for a "
                "function that is one step)"
            )
        functools.update_wrapper(self, fn)
        self.fn = fn
        self.name = check_name("workflow", name or fn.__name__)
        self.queue = check_name("queue", queue)
        if timeout is not None and timeout <= timedelta(0):
            raise ValueError(f"timeout={timeout} of workflow {self.name!r} leaves no time; use more than 0")
        if isinstance(retention, timedelta) and retention < timedelta(0):
            raise ValueError(f"retention={retention} of workflow {self.name!r} is in the past; use 0 or more, or None")
        self.timeout = timeout
        self.retry = retry
        self.retention = retention
        self.version = version
        self.validators: dict[str, Callable[[str], None]] = {}
        """What questions must pass, by their topics: given the payload, they raise."""
        self._checks: dict[str, Callable[..., Any]] = {}
        self._bound: dict[int, Workflow[..., R]] = {}
        self._is_loose = False

    def validator(self, topic: str, /) -> Callable[[V], V]:
        """Declare what looks at a question before the workflow's code sees it: `@checkout.validator("address")`.

        A `def` of one parameter, the value (as its annotation says). It raises `Refused("reason")`, or anything else,
        if the question is to be refused; whoever asked gets that as `Refused`. It must be pure, and quick: it runs on
        the worker's loop, perhaps several times.
        """
        check_name("topic", topic)

        def declare(fn: V) -> V:
            if inspect.iscoroutinefunction(fn) or not callable(fn):
                raise TypeError(f"the validator of topic {topic!r} must be a plain function, with one parameter")
            self._checks[topic] = fn
            self.validators[topic] = _checked(fn)
            return fn

        return declare

    @functools.cached_property
    def parameters(self) -> Parameters:
        """How its arguments become JSON, by their annotations."""
        return Parameters(self.fn, self.name)

    @functools.cached_property
    def shape(self) -> Shape:
        """How its result becomes JSON, by its return annotation."""
        return result_shape(self.fn)

    @functools.cached_property
    def where(self) -> str:
        """What its result is called in an error."""
        return f"the result of workflow {self.name!r}"

    def bind(self, instance: object, name: str) -> Workflow[..., R]:
        """This method as a workflow of that instance, called `name.METHOD`. From now on it is found at the instance."""
        bound = self._bound[id(instance)] = self._of(instance, f"{name}.{self.name}")
        return bound

    def _of(self, instance: object, name: str) -> Workflow[..., R]:
        method: Any = MethodType(self.fn, instance)  # it keeps the instance, so no other one has its id
        bound: Workflow[..., R] = Workflow(
            method,
            name=name,
            queue=self.queue,
            timeout=self.timeout,
            retry=self.retry,
            retention=self.retention,
            version=self.version,
        )
        bound.validators = {topic: _checked(MethodType(check, instance)) for topic, check in self._checks.items()}
        return bound

    @overload
    def __get__(self, instance: None, owner: type[Any]) -> Workflow[P, R]: ...
    @overload
    def __get__(self: Workflow[Concatenate[S, Q], R], instance: S, owner: type[Any] | None = ...) -> Workflow[Q, R]: ...
    def __get__(self, instance: Any, owner: type[Any] | None = None) -> Any:
        """On an instance: the workflow that was registered for it."""
        if instance is None:
            return self
        bound = self._bound.get(id(instance))
        if bound is None:
            bound = self._of(instance, self.name)
            bound._is_loose = True
        return bound

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Invocation[R]:
        if self._is_loose:
            raise WrongPlace(
                f"workflow {self.name!r} is a method of an instance that no app knows; use app.register(name, instance)"
            )
        self.parameters.check(args, kwargs)
        invocation: Invocation[R] = Invocation(self.name, *args, **kwargs)
        invocation.workflow = self
        return invocation

    def __repr__(self) -> str:
        return f"<workflow {self.name}>"


def _checked(fn: Callable[..., Any]) -> Callable[[str], None]:
    def annotation() -> Any:
        hints = {name: hint for name, hint in hints_of(fn).items() if name != "return"}
        return next(iter(hints.values()), ANY)

    given = Shape.deferred(annotation)

    def check(payload: str) -> None:
        fn(given.load(payload))

    return check


class WorkflowDecorator(Protocol):
    """What `@workflow(...)` gives: applied to an `async def`."""

    def __call__(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> Workflow[P, R]: ...


@overload
def workflow(fn: Callable[P, Coroutine[Any, Any, R]], /) -> Workflow[P, R]: ...
@overload
def workflow(
    *,
    name: str = ...,
    queue: str = "default",
    timeout: timedelta | None = None,
    retry: Retry | None = None,
    retention: timedelta | None = ...,
    version: str = ...,
) -> WorkflowDecorator: ...
def workflow(fn: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Declare a workflow; `App(include=[...])` collects it.

    Args:
        name: What its rows are called; by default the function's name.
        queue: Where it waits unless a start says otherwise.
        timeout: How long it may take from when it may start; then its code is cancelled, and it ends in error
            (`DeadlineExceeded`). A start can say otherwise.
        retry: When it is tried again as a whole after it failed: what it failed from is asked for anew, everything else
            that was recorded stays.
        retention: How long it is kept after its end; None: for ever. By default what the app says.
        version: Recorded with it; by default a hash of the app's code.
    """

    def declare(fn: Callable[..., Any]) -> Workflow[..., Any]:
        declared: Workflow[..., Any] = Workflow(fn, **options)
        return declared

    return declare if fn is None else declare(fn)
