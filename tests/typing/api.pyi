"""The public surface of perdure, as signatures. Final where it stands here; more may be added.

Durations are `timedelta`, instants aware `datetime`. `tests/acceptance/test_surface.py` compares the package with it.
"""

# pyright: reportInvalidTypeVarUse=false

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime, timedelta
from enum import StrEnum
from random import Random
from typing import Any, Concatenate, Generic, Literal, Never, NoReturn, ParamSpec, Protocol, overload
from uuid import UUID

from typing_extensions import TypeForm, TypeVar

P = ParamSpec("P")
Q = ParamSpec("Q")
S = TypeVar("S")
Item = TypeVar("Item")
C = TypeVar("C")
C_co = TypeVar("C_co", covariant=True)
T = TypeVar("T", default=Any)
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True, default=Any)
Json = Mapping[str, Any]

class Status(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    WAITING = "waiting"
    SUCCESS = "success"
    ERROR = "error"
    CANCELLED = "cancelled"

class Retry:
    """Attempts are recorded failures; one cut short by a crash is a recovery, not an attempt."""
    def __init__(
        self,
        *,
        max_attempts: int | None = 3,
        initial: timedelta = ...,
        factor: float = 2.0,
        maximum: timedelta = ...,
        jitter: float = 0.1,
        retry_on: tuple[type[Exception], ...] = ...,
        give_up_on: tuple[type[Exception], ...] = (),
    ) -> None: ...

class RetryAfter(Exception):
    """Raised by a step: try again after this long. `counts=False`: a poll, not a failure."""
    def __init__(self, delay: timedelta, *, counts: bool = True) -> None: ...

class Step(Generic[P, R]):
    name: str
    fn: Callable[P, Any]
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[object, Never, R]: ...
    def with_options(
        self, *, retry: Retry | None = ..., timeout: timedelta | None = ..., name: str = ...
    ) -> Step[P, R]: ...
    @overload
    def __get__(self, instance: None, owner: type[Any]) -> Step[P, R]: ...
    @overload
    def __get__(self: Step[Concatenate[S, Q], R], instance: S, owner: type[Any] | None = ...) -> Step[Q, R]: ...

class Invocation(Coroutine[Any, Any, R_co]):
    """A workflow called with its arguments: give it to a verb, or await it inside a workflow (a child)."""

    name: str
    def __init__(self, name: str, /, *args: Any, **kwargs: Any) -> None: ...
    def send(self, value: Any, /) -> Any: ...
    def throw(self, *exc: Any) -> Any: ...
    def close(self) -> None: ...
    def __await__(self) -> Generator[Any, Any, R_co]: ...

class Workflow(Generic[P, R]):
    name: str
    fn: Callable[P, Coroutine[Any, Any, R]]
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Invocation[R]: ...

class StepDecorator(Protocol):
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
    match: Literal["args", "name"] = "args",
    pure: bool = False,
    in_doubt: Literal["rerun", "park"] | Callable[..., Awaitable[Any]] = "rerun",
) -> StepDecorator: ...

class TransactionDecorator(Protocol[C_co]):
    def __call__(self, fn: Callable[Concatenate[C_co, P], Coroutine[Any, Any, R]], /) -> Step[P, R]: ...

class WorkflowDecorator(Protocol):
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
    version: str = ...,
) -> WorkflowDecorator: ...

class Start(Generic[R]):
    """An invocation with options of its own, for `start_many`."""
    def __init__(
        self,
        invocation: Invocation[R],
        *,
        key: str | None = None,
        priority: int = 0,
        partition: str | None = None,
        delay: timedelta | None = None,
        attributes: Json | None = None,
    ) -> None: ...

class Handle(Generic[R_co]):
    id: UUID
    key: str | None
    started: bool  # False where a start attached to an existing workflow
    async def result(self, *, timeout: timedelta | None = None) -> R_co: ...
    async def status(self) -> Status: ...
    async def describe(self) -> WorkflowInfo: ...
    async def steps(self) -> Sequence[StepInfo]: ...
    async def cancel(self, *, reason: str | None = None) -> None: ...
    async def terminate(self, *, reason: str | None = None) -> None: ...
    async def resume(self) -> None: ...
    async def send(self, topic: str, value: Any, *, idempotency_key: str | None = None) -> None: ...
    async def ask(self, topic: str, value: Any, *, type: TypeForm[T] = ..., timeout: timedelta | None = None) -> T: ...
    async def get_event(self, name: str, *, type: TypeForm[T] = ..., timeout: timedelta | None = None) -> T: ...
    def read_stream(self, name: str, *, type: TypeForm[T] = ..., offset: int = 0) -> AsyncIterator[StreamEntry[T]]: ...

class Client:
    """Verbs for callers that need not know the code. Does no I/O until its first verb."""
    def __init__(
        self,
        database_url: str | None = None,
        *,
        schema: str = "perdure",
        connect_timeout: timedelta = ...,
        pool_size: int = 4,
    ) -> None: ...
    async def start(
        self,
        invocation: Invocation[R],
        /,
        *,
        key: str | None = None,
        on_conflict: Literal["attach", "raise", "replace_finished"] = "attach",
        queue: str | None = None,
        priority: int = 0,
        partition: str | None = None,
        delay: timedelta | None = None,
        start_at: datetime | None = None,
        timeout: timedelta | None = None,
        attributes: Json | None = None,
        connection: Any = None,
    ) -> Handle[R]: ...
    async def start_many(
        self, invocations: Iterable[Invocation[R] | Start[R]], /, *, queue: str | None = None, connection: Any = None
    ) -> list[Handle[R]]: ...
    async def run(
        self,
        invocation: Invocation[R],
        /,
        *,
        key: str | None = None,
        queue: str | None = None,
        priority: int = 0,
        partition: str | None = None,
        timeout: timedelta | None = None,
    ) -> R: ...
    def handle(self, id: UUID, /, type: TypeForm[T] = ...) -> Handle[T]: ...
    @overload
    async def find(self, workflow: Workflow[..., R], /, *, key: str) -> Handle[R] | None: ...
    @overload
    async def find(self, workflow: str, /, *, key: str) -> Handle[Any] | None: ...
    def workflows(
        self,
        *,
        status: Status | None = None,
        name: str | None = None,
        queue: str | None = None,
        key_prefix: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        attributes: Json | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[WorkflowInfo]: ...
    async def close(self) -> None: ...
    async def __aenter__(self) -> Client: ...
    async def __aexit__(self, *exc: object) -> None: ...

class App(Client):
    """A client that knows the code: declares or collects workflows, and makes workers."""
    def __init__(
        self,
        name: str = "app",
        /,
        *,
        include: Iterable[Any] = (),
        errors: Iterable[type[Exception]] = (),
        database_url: str | None = None,
        schema: str = "perdure",
        codec: Any = None,
        version: str | None = None,
    ) -> None: ...
    @overload
    def workflow(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> Workflow[P, R]: ...
    @overload
    def workflow(
        self,
        *,
        name: str = ...,
        queue: str = "default",
        timeout: timedelta | None = None,
        retry: Retry | None = None,
        version: str = ...,
    ) -> WorkflowDecorator: ...
    # a workflow whose body is one step: what a Celery task is
    @overload
    def job(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> Workflow[P, R]: ...
    @overload
    def job(self, fn: Callable[P, R], /) -> Workflow[P, R]: ...
    @overload
    def job(
        self, *, name: str = ..., retry: Retry | None = None, queue: str = "default", timeout: timedelta | None = None
    ) -> Any: ...
    # steps whose writes and checkpoint commit together; the first parameter is what `using` makes
    # (connection, session), and callers don't pass it
    def transaction(
        self,
        *,
        using: Callable[[], AbstractAsyncContextManager[C]],
        isolation: str | None = None,
        retry: Retry | None = None,
    ) -> TransactionDecorator[C]: ...
    async def start_or_send(self, invocation: Invocation[R], topic: str, value: Any, /, *, key: str) -> Handle[R]: ...
    async def fork(self, id: UUID, /, *, after: str | None = None, patch: Json | None = None) -> Handle[Any]: ...
    def worker(
        self,
        *,
        queues: Iterable[str] | None = None,
        concurrency: int = 100,
        lease: timedelta = ...,
        grace: timedelta = ...,
    ) -> AbstractAsyncContextManager[Any]: ...
    @property
    def blocking(self) -> Any: ...  # the same verbs without await, statically typed: BlockingApp, BlockingHandle[R]

# --- inside a workflow -----------------------------------------------------------------------------------------------
async def sleep(delay: timedelta, /) -> None: ...
async def sleep_until(when: datetime, /) -> None: ...
def timeout(delay: timedelta | None, /) -> AbstractAsyncContextManager[Any]: ...
async def run_step(
    name: str, fn: Callable[..., Any], /, *args: Any, retry: Retry | None = None, **kwargs: Any
) -> Any: ...
async def recv(topic: str, /, *, type: TypeForm[T] = ..., timeout: timedelta | None = None) -> T: ...
def answering(topic: str, /, *, type: TypeForm[T] = ...) -> AbstractAsyncContextManager[Question[T]]: ...
async def send(target: Handle[Any] | UUID, topic: str, value: Any, /) -> None: ...
async def set_event(name: str, value: Any, /) -> None: ...
async def write_stream(name: str, value: Any, /) -> None: ...
async def map(fn: Callable[[Item], Awaitable[R]], items: Iterable[Item], /, *, concurrency: int) -> list[R]: ...
def as_completed(calls: Iterable[Awaitable[Item]], /) -> AsyncIterator[Item]: ...
async def continue_as_new(invocation: Invocation[Any], /) -> NoReturn: ...
def saga() -> AbstractAsyncContextManager[Saga]: ...
def now() -> datetime: ...
def random() -> Random: ...
def uuid4() -> UUID: ...
def patched(name: str, /) -> bool: ...
def current() -> Current: ...

class Current(Protocol):
    """Where this code is running."""

    id: UUID
    name: str
    attempt: int
    deadline: datetime | None
    idempotency_key: str  # in a step: the same for all its attempts
    replaying: bool  # checkpoints are being served
    logger: Any  # silent while replaying
    def check(self) -> None: ...  # in a `def` step: raises if it was cancelled or timed out

class Saga(Protocol):
    def compensate(self, step: Callable[P, Awaitable[Any]], /, *args: P.args, **kwargs: P.kwargs) -> None: ...

class Question(Protocol[T]):
    """What `handle.ask` sent; left without a reply, the error that ended the block is the answer."""

    value: T
    def reply(self, value: Any, /) -> None: ...

class StreamEntry(Generic[T]):
    offset: int
    value: T
    attempt: int

class WorkflowInfo(Protocol): ...  # the columns of the view `workflows`
class StepInfo(Protocol): ...  # the columns of the view `workflow_steps`
