"""The app: a client that knows the code. It declares or collects workflows, and makes workers."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, overload

from typing_extensions import TypeVar

from perdure.annotations import ANY
from perdure.authoring.steps import OnExhausted, Step, Transaction
from perdure.authoring.workflows import Workflow, WorkflowDecorator
from perdure.blocking import BlockingApp
from perdure.client import Client
from perdure.codec import Codec, Shape, shape
from perdure.config import KEEP
from perdure.failures import Catalogue
from perdure.model.keys import check_name
from perdure.model.retry import Retry
from perdure.model.unset import UNSET, Unset
from perdure.registry import Registry

if TYPE_CHECKING:
    from perdure.worker import Program, Worker, WorkerOptions

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
C = TypeVar("C")
C_co = TypeVar("C_co", covariant=True)


class TransactionDecorator(Protocol[C_co]):
    """What `app.transaction(...)` gives: applied to an `async def` whose first parameter is the connection."""

    def __call__(self, fn: Callable[Concatenate[C_co, P], Coroutine[Any, Any, R]], /) -> Step[P, R]: ...


class JobDecorator(Protocol):
    """What `@app.job(...)` gives: applied to an `async def` or a `def`."""

    @overload
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> Workflow[P, R]: ...
    @overload
    def __call__(self, fn: Callable[P, R], /) -> Workflow[P, R]: ...


class App(Client):
    """A client that knows the code.

    Args:
        name: What its workers are called.
        include: Modules, their names, or workflows, to be collected at first use.
        errors: Classes of errors that callers and workflows get as themselves.
        database_url: A PostgreSQL URL. None: `PERDURE_DATABASE_URL`, else the embedded server.
        schema: The schema that holds perdure's tables; two apps in one database don't meet if theirs differ.
        connect_timeout: For how long a verb tries to reach the database before it raises `DatabaseUnavailable`.
        pool_size: How many connections may be open at once, beside those of a worker.
        codec: Stands between payloads and the database: compression, encryption.
        version: The version of this code; by default a hash of it.
        retention: How long workflows are kept after their end, unless they say otherwise; None: for ever.
        strict: Whether it is an error, rather than a warning, that workflow code waits for what isn't recorded.
    """

    def __init__(
        self,
        name: str = "app",
        /,
        *,
        include: Iterable[Any] = (),
        errors: Iterable[type[Exception]] = (),
        database_url: str | None = None,
        schema: str = "perdure",
        connect_timeout: timedelta = timedelta(seconds=30),
        pool_size: int = 4,
        codec: Codec | None = None,
        version: str | None = None,
        retention: timedelta | None = KEEP,
        strict: bool = False,
    ) -> None:
        super().__init__(database_url, schema=schema, connect_timeout=connect_timeout, pool_size=pool_size)
        if retention is not None and retention < timedelta(0):
            raise ValueError(f"retention={retention} is in the past; use 0 or more, or None")
        self._retention = retention
        self._strict = strict
        self.name = check_name("app", name)
        self._registry = Registry(include, errors)
        self._codec = codec
        self._version = version

    # --- declaring -------------------------------------------------------------------------------------------------

    @overload
    def workflow(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> Workflow[P, R]: ...
    @overload
    def workflow(
        self,
        /,
        *,
        name: str = ...,
        queue: str = "default",
        timeout: timedelta | None = None,
        retry: Retry | None = None,
        retention: timedelta | None = ...,
        version: str = ...,
    ) -> WorkflowDecorator: ...
    def workflow(self, fn: Any = None, /, **options: Any) -> Any:
        """Declare a workflow of this app; the options are those of `perdure.workflow`.

        Raises:
            DuplicateName: Another function of the app has its name.
        """

        def declare(fn: Callable[..., Any]) -> Workflow[..., Any]:
            declared: Workflow[..., Any] = Workflow(fn, **options)
            self._registry.add(declared)
            return declared

        return declare if fn is None else declare(fn)

    @overload
    def job(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> Workflow[P, R]: ...
    @overload
    def job(self, fn: Callable[P, R], /) -> Workflow[P, R]: ...
    @overload
    def job(
        self,
        /,
        *,
        name: str = ...,
        retry: Retry | None = None,
        queue: str = "default",
        timeout: timedelta | None = None,
        idempotent: bool = False,
        on_exhausted: OnExhausted = "fail",
        retention: timedelta | None = ...,
    ) -> JobDecorator: ...
    def job(
        self,
        fn: Any = None,
        /,
        *,
        name: str | None = None,
        retry: Retry | None = None,
        queue: str = "default",
        timeout: timedelta | None = None,
        idempotent: bool = False,
        on_exhausted: OnExhausted = "fail",
        retention: timedelta | Unset | None = UNSET,
    ) -> Any:
        """Declare a workflow whose body is one step, `def` or `async def`.

        Args:
            name: What its rows are called; by default the function's name.
            retry: When it is tried again; None: one attempt.
            queue: Where it waits unless a start says otherwise.
            timeout: How long one attempt may take.
            idempotent: Running it again, after a crash, does no harm; `perdure.testing.crash_everywhere` asks.
            on_exhausted: "park": after its last attempt it waits for an operator, who resumes it.
            retention: How long it is kept after its end; None: for ever. By default what the app says.
        """

        def declare(fn: Callable[..., Any]) -> Workflow[..., Any]:
            step: Step[..., Any] = Step(
                fn, name=name, retry=retry, timeout=timeout, idempotent=idempotent, on_exhausted=on_exhausted
            )

            @functools.wraps(fn)
            async def body(*args: Any, **kwargs: Any) -> Any:
                return await step(*args, **kwargs)

            declared: Workflow[..., Any] = Workflow(body, name=name, queue=queue, retention=retention)
            self._registry.add(declared)
            return declared

        return declare if fn is None else declare(fn)

    def transaction(
        self,
        *,
        using: Callable[[], AbstractAsyncContextManager[C]],
        isolation: str | None = None,
        retry: Retry | None = None,
        on_exhausted: OnExhausted = "fail",
        name: str | None = None,
    ) -> TransactionDecorator[C]:
        """Declare a step whose writes and checkpoint commit together, so that it takes effect exactly once.

        Args:
            using: Makes a psycopg connection to the app's database: `pool.connection`, for instance. It is the
                function's first argument; callers don't pass it. perdure begins and commits the transaction.
            isolation: "read committed", "repeatable read" or "serializable"; None: the connection's default.
            retry: When it is tried again after an error; conflicts between transactions are repeated anyway.
            on_exhausted: "park": after its last attempt it waits for an operator, who resumes it.
            name: What its checkpoints are called; by default the function's name.
        """

        def declare(fn: Callable[..., Any]) -> Any:
            step: Step[..., Any] = Step(
                fn,
                name=name,
                retry=retry,
                on_exhausted=on_exhausted,
                transaction=Transaction(using=using, isolation=isolation),
            )
            return step

        return declare

    def register(self, name: str, instance: T, /) -> T:
        """Make the workflows among an instance's methods known, as `NAME.METHOD`; returns the instance.

        What its methods need (clients, pools, settings) is the instance's own, given to it where it is made: it isn't
        recorded, and each worker has its own. So a worker must register it, too, under the same name.

        Raises:
            ValueError: None of its methods is a workflow.
            DuplicateName: Another workflow of the app has such a name.
        """
        check_name("instance", name)
        methods: dict[str, Workflow[..., Any]] = {}
        for cls in reversed(type(instance).__mro__):
            methods |= {attribute: each for attribute, each in vars(cls).items() if isinstance(each, Workflow)}
        if not methods:
            raise ValueError(f"no method of {type(instance).__name__!r} is a workflow; decorate one with @workflow")
        for method in methods.values():
            self._registry.add(method.bind(instance, name))
        return instance

    # --- running ---------------------------------------------------------------------------------------------------

    def worker(
        self,
        *,
        queues: Iterable[str] | None = None,
        concurrency: int = 100,
        lease: timedelta = timedelta(seconds=10),
        grace: timedelta = timedelta(seconds=20),
        only_version: bool = False,
    ) -> AbstractAsyncContextManager[Worker]:
        """A worker in this process: `async with app.worker(): ...`. When the block ends, it hands over what is left.

        Args:
            queues: The queues that it serves; None: all.
            concurrency: How many workflows run at the same time, at most.
            lease: How long it may go unheard before others take over.
            grace: How long steps may go on when it stops.
            only_version: Leave workflows that began under another version of the code to workers of that version.
        """
        from perdure.worker import WorkerOptions

        options = WorkerOptions(
            queues=None if queues is None else tuple(queues),
            concurrency=concurrency,
            lease=lease,
            grace=grace,
            only_version=only_version,
        )
        return self._worker(options)

    @asynccontextmanager
    async def _worker(self, options: WorkerOptions) -> AsyncGenerator[Worker]:
        from perdure.worker import Worker

        worker = Worker(self.session(), self.program, options)
        await worker.start()
        try:
            yield worker
        finally:
            await worker.stop()

    @property
    def program(self) -> Program:
        """Its code, as a worker runs it."""
        from perdure.worker import Program

        return Program(
            app=self.name,
            version=self.version,
            workflows=self._registry.workflows,
            catalogue=self.catalogue,
            codec=self.codec,
            strict=self._strict,
            retention={
                name: self._retention if isinstance(workflow.retention, Unset) else workflow.retention
                for name, workflow in self._registry.workflows.items()
            },
        )

    @functools.cached_property
    def blocking(self) -> BlockingApp:
        """The same verbs without `await`, for code without an event loop (Django, Flask, scripts)."""
        return BlockingApp(self)

    # --- what it knows ---------------------------------------------------------------------------------------------

    @property
    def catalogue(self) -> Catalogue:
        """The classes of errors that can be raised as themselves."""
        return self._registry.catalogue

    @property
    def codec(self) -> Codec | None:
        """What stands between payloads and the database."""
        return self._codec

    @property
    def version(self) -> str:
        """The version of this code."""
        if self._version is None:
            self._version = self._registry.version
        return self._version

    @property
    def workflow_functions(self) -> Mapping[str, Workflow[..., Any]]:
        """Its workflows, by name."""
        return self._registry.workflows

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its workflows, sorted."""
        return tuple(sorted(self._registry.workflows))

    def _output_shape(self, key: str) -> Shape:
        name = key.rpartition("/")[2].partition("#")[0]
        known = self._registry.steps.get(name) or self._registry.workflows.get(name)
        return shape(ANY) if known is None else known.shape

    def _result_shape(self, name: str, workflow: Workflow[..., Any] | str | None) -> Any:
        if isinstance(workflow, Workflow):
            return workflow.shape
        known = self._registry.workflows.get(name)
        return known.shape if known is not None else shape(ANY)
