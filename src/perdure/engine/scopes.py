"""Task scopes: which task of a workflow a call comes from, the same on every replay.

A key is made of the path of tasks, the step's name, and the how-manieth of that name in that task. The path must not
depend on what else runs in the process, so it is no counter of tasks: a segment is the task's explicit name, else the
`__qualname__` of its coroutine, with the occurrence of that segment among its siblings, in order of creation. A task
that some library creates takes a number only among its own kind, so it shifts nobody else.

How it gets there: the worker sets a task factory on its loop, which forwards to the one that was set before (eager or
not). A task created in workflow code gets a scope of its own, as the context variable of the context that it is made
with; anything else is forwarded untouched. Step bodies run with a `StepContext` in that variable, so what they create
belongs to nobody.

A task gets its name after its factory has returned (until Python 3.13), so a segment is made when it is first needed:
then all siblings that were created earlier get theirs first, and the numbers follow the order of creation. Those that
have ended need none, but count: they do so as soon as all that were created before them do.

An eager task runs before its factory has returned: its scope finds it at the first call of a primitive, and its name in
the frames of those who create it.
"""

from __future__ import annotations

import asyncio
import contextvars
import re
import sys
import weakref
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import datetime, timedelta
from types import CodeType, FrameType
from typing import Any, Protocol
from uuid import UUID

from perdure.authoring.asking import REPLY
from perdure.authoring.attributes import ATTRIBUTES
from perdure.authoring.children import RESULT, START
from perdure.authoring.context import CURRENT
from perdure.authoring.events import ANNOUNCE, AWAITED
from perdure.authoring.messages import POST
from perdure.authoring.workflows import Invocation
from perdure.engine.children import Children
from perdure.engine.delivery import Task
from perdure.errors import ForeignAwait, WrongPlace
from perdure.model.keys import occurrence, segment
from perdure.store.programs import NewWorkflow

_IN_WORKFLOW = (
    "a verb of the app was called in a workflow's own code, where a replay would do it again; call it in a step"
)
_TASKS = asyncio.tasks.__file__
_ITERATES_A_SET = frozenset({"as_completed", "_AsCompletedIterator.__init__"})
_DEFAULT_NAME = re.compile(r"Task-\d+|None")  # None: what Python 3.13.0 calls a task that was given no name


class Running(Protocol):
    """What a scope needs of its run."""

    @property
    def id(self) -> UUID: ...
    @property
    def name(self) -> str: ...
    @property
    def origin(self) -> str: ...
    @property
    def over(self) -> bool: ...
    @property
    def attempt(self) -> int: ...
    @property
    def replaying(self) -> bool: ...
    @property
    def logger(self) -> Any: ...
    def adopt(self, task: asyncio.Task[Any]) -> None: ...
    def release(self, task: asyncio.Task[Any]) -> None: ...
    def call(self, key: str, step: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Coroutine[Any, Any, Any]: ...
    def value(self, key: str, make: Callable[[], Any]) -> Any: ...
    def time(self) -> str: ...
    def sleep(self, key: str, name: str, delay: Callable[[], timedelta]) -> Coroutine[Any, Any, None]: ...
    def limit(self, key: str, delay: timedelta | None) -> AbstractAsyncContextManager[Any]: ...
    def receive(self, key: str, topic: str, limit: timedelta | None) -> Coroutine[Any, Any, str]: ...
    def question(self, key: str, topic: str) -> Coroutine[Any, Any, tuple[str, UUID | None]]: ...
    @property
    def max_payload(self) -> int: ...
    def patched(self, name: str) -> bool: ...
    def write_stream(self, key: str, name: str, payload: str) -> Coroutine[Any, Any, None]: ...
    def set_attributes(self, attributes: str) -> Coroutine[Any, Any, None]: ...
    def continue_as_new(self, invocation: Invocation[Any]) -> None: ...
    def child(self, key: str, invocation: Invocation[Any]) -> Coroutine[Any, Any, Any]: ...
    def start_child(self, key: str, new: NewWorkflow, *, detached: bool) -> Coroutine[Any, Any, UUID]: ...
    def outcome(self, key: str, id: UUID, *, cancels: bool) -> Coroutine[Any, Any, tuple[str, str]]: ...
    @property
    def children(self) -> Children: ...
    def is_home(self, settings: object) -> bool: ...
    @property
    def call_code(self) -> CodeType: ...
    @property
    def deadline(self) -> datetime | None: ...


class Scope:
    """One task of a workflow: the context of the code that runs in it."""

    __slots__ = (
        "_children",
        "_counts",
        "_has_ended",
        "_is_bound",
        "_label",
        "_parent",
        "_path",
        "_segment",
        "_segments",
        "_task",
        "run",
    )

    def __init__(self, run: Running, parent: Scope | None = None, label: str = "") -> None:
        self.run = run
        self._parent = parent
        self._label = label
        # Weak: task, context, scope would be a cycle, and every finished workflow work for the garbage collector.
        self._task: weakref.ref[asyncio.Task[Any]] | None = None
        self._is_bound = False
        self._has_ended = False
        self._path = "" if parent is None else None
        self._segment: str | None = None
        self._counts: dict[str, int] = {}
        self._segments: dict[str, int] = {}
        self._children: deque[Scope] | None = None

    def branch(self, coroutine: Any, name: str | None) -> Scope:
        """The scope of a task that is created in this one; its name, if that is known already."""
        if name is None or _is_default(name):
            name = str(getattr(coroutine, "__qualname__", type(coroutine).__qualname__))
        scope = Scope(self.run, self, name)
        if self._children is None:
            self._children = deque()
        self._children.append(scope)
        return scope

    def bind(self, task: asyncio.Task[Any] | None) -> None:
        """Tell the scope its task, and the run that it has one more; the first time counts."""
        if self._is_bound or task is None:
            return
        self._is_bound = True
        self.run.adopt(task)
        if self._parent is not None:  # else it is the run's own, which looks after it
            self._task = weakref.ref(task)
            task.add_done_callback(self._task_ended)

    def meet(self) -> None:
        """Its code runs: if nobody has told it its task yet, that is an eager one, and the current one."""
        if not self._is_bound:
            self.bind(asyncio.current_task())

    def draw(self, name: str) -> str:
        """The key of the next call of that name in this task."""
        if not self._is_bound:
            self.meet()
        count = self._counts.get(name, 0) + 1
        self._counts[name] = count
        return self.path + (name if count == 1 else f"{name}#{count}")

    def close(self) -> None:
        """The workflow's code has ended: let go of the tasks below, which refer to this one."""
        children, self._children = self._children, None
        for child in children or ():
            child.settle(child._path or "")  # one that outlives its workflow may still ask, and is told RunEnded
            child.close()

    @property
    def path(self) -> str:
        """The path of tasks, with a slash at its end; empty for the workflow's own code."""
        if self._path is None:
            assert self._parent is not None
            if self._segment is None:
                self._parent.name_children()
            self._path = f"{self._parent.path}{self._segment}/"
        return self._path

    def name_children(self, *, ended: bool = False) -> None:
        """Give a segment to every task that was created so far, in order; or to the first ones that have ended."""
        children = self._children
        while children and (children[0]._has_ended or not ended):
            child = children.popleft()
            name = segment(child.label())
            count = self._segments[name] = self._segments.get(name, 0) + 1
            child._segment = occurrence(name, count)

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        """Its name counts among its siblings, though nobody may need it: remember it, because nobody keeps the task."""
        self.run.release(task)
        if self._segment is None and self._path is None:
            assert self._parent is not None
            self._label = self.label()
            self._has_ended = True
            self._parent.name_children(ended=True)

    def label(self) -> str:
        """The task's explicit name, else that of its coroutine."""
        task = self._task() if self._task is not None else None
        name = task.get_name() if task is not None else ""
        return self._label if _is_default(name) else name

    def settle(self, path: str) -> None:
        """From now on this is the path."""
        self._path = path

    # --- what code finds here (the protocol Context) ---------------------------------------------------------------

    def call(self, step: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        return self.run.call(self.draw(step.name), step, args, kwargs)

    is_workflow = True

    @property
    def has_ended(self) -> bool:
        return self.run.over

    def child_key(self, name: str) -> str:
        return self.draw(name)

    async def child(self, invocation: Invocation[Any], key: str | None) -> Any:
        self.meet()  # it may be a task of its own
        return await self.run.child(key or self.draw(invocation.name), invocation)

    async def start_child(self, new: NewWorkflow, key: str | None, *, detached: bool) -> tuple[UUID, bool]:
        if new.key is None:
            return await self.run.start_child(key or self.draw(new.name), new, detached=detached), True
        started = await self.call(START, (replace(new, detached=detached),), {})
        id, is_new = UUID(started["id"]), bool(started["started"])
        if is_new:
            self.run.children.add(id, detached=detached)
        return id, is_new

    async def outcome_of(self, id: UUID, key: str | None = None) -> tuple[str, str, str]:
        self.meet()
        own = id in self.run.children.known
        key, cancels = (self.draw("result()"), False) if key is None or not own else (key, True)
        if own:
            return key, *await self.run.outcome(key, id, cancels=cancels)
        return key, *await self.run.call(key, RESULT, (str(id),), {})

    def write_stream(self, name: str, payload: str) -> Coroutine[Any, Any, None]:
        return self.run.write_stream(self.draw(f"write_stream({name})"), name, payload)

    def set_attributes(self, attributes: str) -> Coroutine[Any, Any, None]:
        return self.call(ATTRIBUTES, (attributes,), {})

    async def continue_as_new(self, invocation: Invocation[Any]) -> None:
        invocation.close()
        if self._parent is not None:
            raise WrongPlace(
                "continue_as_new() was called in a task of its own; call it in the workflow function itself"
            )
        self.run.continue_as_new(invocation)

    async def start_elsewhere(self, new: NewWorkflow) -> dict[str, Any]:
        raise WrongPlace(_IN_WORKFLOW)

    async def result_elsewhere(self, id: UUID) -> tuple[str, str] | None:
        raise WrongPlace(_IN_WORKFLOW)

    def is_home(self, settings: object) -> bool:
        return self.run.is_home(settings)

    def value(self, name: str, make: Callable[[], Any]) -> Any:
        return self.run.value(self.draw(f"{name}()"), make)

    def time(self) -> str:
        return self.run.time()

    def sleep(self, name: str, delay: Callable[[], timedelta]) -> Coroutine[Any, Any, None]:
        return self.run.sleep(self.draw(f"{name}()"), name, delay)

    def receive(self, topic: str, limit: timedelta | None) -> Coroutine[Any, Any, str]:
        return self.run.receive(self.draw(f"recv({topic})"), topic, limit)

    def send(self, target: UUID, topic: str, payload: str) -> Coroutine[Any, Any, None]:
        return self.call(POST, (str(target), topic, payload), {})

    def question(self, topic: str) -> Coroutine[Any, Any, tuple[str, UUID | None]]:
        return self.run.question(self.draw(f"recv({topic})"), topic)

    def answer(self, question: UUID | None, payload: str) -> Coroutine[Any, Any, None]:
        return self.call(REPLY, ("" if question is None else str(question), payload), {})

    def announce(self, name: str, payload: str) -> Coroutine[Any, Any, None]:
        return self.call(ANNOUNCE, (name, payload), {})

    def awaited(self, owner: UUID, name: str) -> Coroutine[Any, Any, str | None]:
        return self.call(AWAITED, (str(owner), name), {})

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    @property
    def max_payload(self) -> int:
        return self.run.max_payload

    def limit(self, delay: timedelta | None) -> AbstractAsyncContextManager[Any]:
        return self.run.limit(self.draw("timeout()"), delay)

    def patched(self, name: str) -> bool:
        return self.run.patched(name)

    def check_verb(self) -> None:
        raise WrongPlace(_IN_WORKFLOW)

    def start_key(self, name: str) -> str:
        raise WrongPlace(_IN_WORKFLOW)

    @property
    def id(self) -> UUID:
        return self.run.id

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def attempt(self) -> int:
        return self.run.attempt

    @property
    def deadline(self) -> datetime | None:
        return self.run.deadline

    @property
    def idempotency_key(self) -> str:
        return self.run.origin

    @property
    def replaying(self) -> bool:
        return self.run.replaying

    @property
    def logger(self) -> Any:
        return self.run.logger

    def check(self) -> None:
        """Workflow code is cancelled at its awaits."""


def install(loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
    """Give tasks of workflow code their scopes, on this loop; returns what puts the former factory back."""
    former = loop.get_task_factory()

    def factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Future[Any]:
        scope = CURRENT.get()
        context: contextvars.Context | None = options.get("context")
        inner = None if context is None else context.get(CURRENT)
        if not isinstance(scope, Scope) or not (inner is None or inner is scope):
            return _forward(former, loop, coroutine, options)  # the latter: another worker's factory has done it
        _refuse_sets(scope, coroutine)
        scope.meet()  # before its child does: an eager one must not take itself for the only task
        name: str | None = options.get("name")
        if name is None and former is not None:
            name = _name_given()
        child = scope.branch(coroutine, name)
        context = contextvars.copy_context() if context is None else context
        context.run(CURRENT.set, child)
        task = _forward(former, loop, coroutine, options | {"context": context})
        if isinstance(task, asyncio.Task):
            child.bind(task)
        return task

    loop.set_task_factory(factory)

    def restore() -> None:
        if loop.get_task_factory() is factory:
            loop.set_task_factory(former)

    return restore


def _refuse_sets(scope: Scope, coroutine: Any) -> None:
    """`asyncio.as_completed` iterates over a set: the order of its tasks would be that of their addresses."""
    frame = sys._getframe(2)  # create_task, ensure_future, and whoever called it
    for _ in range(6):
        if frame.f_code.co_qualname in _ITERATES_A_SET and frame.f_code.co_filename == _TASKS:
            if getattr(coroutine, "cr_code", None) is scope.run.call_code or isinstance(coroutine, Invocation):
                return  # a step or a child, whose key is drawn already
            coroutine.close()
            raise ForeignAwait(
                scope.run.name,
                "asyncio.as_completed() over coroutines, whose order differs from run to run (give it tasks, or use "
                "perdure.as_completed(),",
                f"{coroutine.cr_code.co_filename}:{coroutine.cr_code.co_firstlineno})",
            )
        if frame.f_back is None:
            return
        frame = frame.f_back


def _is_default(name: str) -> bool:
    return not name or _DEFAULT_NAME.fullmatch(name) is not None


def _name_given() -> str | None:
    """What those who create a task will call it, when they have it: then an eager one has run already."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name == "create_task":
        name = frame.f_locals.get("name")
        if name is not None:
            return str(name)
        frame = frame.f_back
    return None


def _forward(
    former: Any, loop: asyncio.AbstractEventLoop, coroutine: Any, options: dict[str, Any]
) -> asyncio.Future[Any]:
    if former is None:
        return Task(coroutine, loop=loop, **options)
    task: asyncio.Future[Any] = former(loop, coroutine, **options)
    return task
