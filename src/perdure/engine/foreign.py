"""What a task of a workflow waits for, when that isn't perdure: its own siblings, or something from outside?

Tasks that wait for each other (`gather`, `wait`, a task group, a lock, a queue, an event) are no reason to keep a run
in memory: a replay brings them to the same place. An HTTP call is one, and it is a mistake besides: what workflow code
awaits must be recorded. asyncio doesn't say what a future is for, so this looks at the frames that wait: those of
asyncio's own structures are known.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection
from types import FrameType
from typing import Any

_ASYNCIO = os.path.dirname(asyncio.__file__)
_STRUCTURES = frozenset(
    os.path.join(_ASYNCIO, name)
    for name in ("taskgroups.py", "locks.py", "queues.py", "tasks.py", "timeouts.py", "futures.py", "staggered.py")
)


def waits_for_own(task: asyncio.Task[Any], own: Collection[asyncio.Task[Any]]) -> bool:
    """Whether a task that doesn't run waits for other tasks of its workflow."""
    future: Any = getattr(task, "_fut_waiter", None)
    if future is None or future.done():
        return True  # it is about to go on
    return _is_own(future, own) or _is_structure(innermost_frame(task))


def ends_with_tasks(task: asyncio.Task[Any], future: asyncio.Future[Any]) -> bool:
    """Whether nothing but the ends of other tasks lets this one go on, each in one step: `gather`, `wait`, a group."""
    if isinstance(future, asyncio.Task):
        return True
    waited: Any = getattr(future, "_children", None)
    if waited is None:
        frame = innermost_frame(task)
        if frame is None or not frame.f_code.co_filename.startswith(_ASYNCIO):
            return False
        if os.path.basename(frame.f_code.co_filename) == "taskgroups.py":
            return True
        waited = frame.f_locals.get("fs") if frame.f_code.co_name == "_wait" else None
    return bool(waited) and all(isinstance(each, asyncio.Task) for each in waited)


def is_about_to_end(future: asyncio.Future[Any]) -> bool:
    """Whether it is a gather, of gathers perhaps, for which there is nothing left to wait."""
    children: Any = getattr(future, "_children", None)
    return bool(children) and all(child.done() or is_about_to_end(child) for child in children)


def _is_own(future: Any, own: Collection[asyncio.Task[Any]]) -> bool:
    if isinstance(future, asyncio.Task):
        return future in own
    children = getattr(future, "_children", None)  # a gather
    if children is not None:
        return all(child.done() or _is_own(child, own) for child in children)
    callbacks = getattr(future, "_callbacks", None) or ()
    return any("shield" in getattr(callback, "__qualname__", "") for callback, _ in callbacks)


def _is_structure(frame: FrameType | None) -> bool:
    return frame is not None and frame.f_code.co_filename in _STRUCTURES and frame.f_code.co_name != "sleep"


def innermost_frame(task: asyncio.Task[Any]) -> FrameType | None:
    """Where a task stands: the frame of the innermost coroutine that has one."""
    frame: FrameType | None = None
    awaited: Any = task.get_coro()
    while awaited is not None:
        own = (
            getattr(awaited, "cr_frame", None)
            or getattr(awaited, "gi_frame", None)
            or getattr(awaited, "ag_frame", None)
        )
        if own is None:
            break
        frame = own
        awaited = (
            getattr(awaited, "cr_await", None)
            or getattr(awaited, "gi_yieldfrom", None)
            or getattr(awaited, "ag_await", None)
        )
    return frame


def place(task: asyncio.Task[Any]) -> str:
    """The line of the author's code at which a task stands, as `file:line in function`."""
    awaited: Any = task.get_coro()
    found = "?"
    while awaited is not None:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
        if frame is None:
            break
        if (
            not frame.f_code.co_filename.startswith(_ASYNCIO)
            and os.sep + "perdure" + os.sep not in frame.f_code.co_filename
        ):
            found = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
    return found
