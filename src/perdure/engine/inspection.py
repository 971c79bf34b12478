"""Finds workflow code that waits for what isn't recorded: an HTTP call, `asyncio.sleep`, `asyncio.timeout`.

A replay would begin such a wait anew, or take another path: what it gives must be a step. Two ways to notice:

- timers at the line that sets them: the worker's loop is asked for a timer while a workflow's own code runs
  (`watch_timers`);
- anything else when it lasts: now and then the worker looks at runs whose tasks neither run, nor wait for each other,
  nor for perdure (`Inspection`).

With `strict` (`App(strict=True)`, and always in `perdure.testing`) it is an error in the workflow; else a warning event
that names the line, once for each.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from typing import Any, Protocol
from uuid import UUID

from perdure import telemetry
from perdure.authoring.context import CURRENT
from perdure.engine import foreign
from perdure.engine.loop import Loop, Turns
from perdure.engine.run import Run
from perdure.engine.scopes import Scope
from perdure.errors import ForeignAwait

_LOOK_SECONDS = 1.0
_OWN = os.sep + "perdure" + os.sep
_ASYNCIO = os.path.dirname(asyncio.__file__)


class Running(Protocol):
    """Whoever has runs."""

    runs: dict[UUID, Run]


class Inspection(Loop):
    """Looks at the runs that wait for something unknown."""

    name = "inspection"

    def __init__(self, host: Running, *, strict: bool, turns: Turns) -> None:
        super().__init__(_LOOK_SECONDS, turns=turns)
        self._host = host
        self._strict = strict
        self._told: set[tuple[str, str]] = set()

    async def tick(self) -> float | None:
        for run in list(self._host.runs.values()):
            if not run.over and run.is_stuck_outside:
                self._look_at(run)
        return None

    def _look_at(self, run: Run) -> None:
        for task in run.delivery.awake:
            if not foreign.waits_for_own(task, run.delivery.tasks):
                error = self.found(run.id, run.name, "something that isn't recorded", foreign.place(task))
                if error is not None:
                    run.fail(error)
                return
        run.consider()  # what it waited for has come, perhaps: nobody else notices that it is at rest now

    def found(self, id: Any, name: str, what: str, line: str) -> ForeignAwait | None:
        """Tell it, once for each line; returns the error, where it is to be one."""
        if self._strict:
            return ForeignAwait(name, what, line)
        if (name, line) not in self._told:
            self._told.add((name, line))
            telemetry.emit(telemetry.AwaitsForeign(workflow_id=id, name=name, what=what, line=line))
        return None

    def watch_timers(self, loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
        """Notice timers that a workflow's own code sets; returns what ends that."""
        originals = {"call_later": loop.call_later, "call_at": loop.call_at}
        former = {name: vars(loop)[name] for name in originals if name in vars(loop)}
        watching = True

        def watched(original: Callable[..., asyncio.TimerHandle]) -> Callable[..., asyncio.TimerHandle]:
            def set_timer(when: float, callback: Callable[..., object], *args: Any, **options: Any) -> Any:
                scope = CURRENT.get()
                if watching and isinstance(scope, Scope) and not _is_own(callback):
                    what, line = _caller()
                    error = self.found(scope.run.id, scope.run.name, what, line)
                    if error is not None:
                        raise error
                return original(when, callback, *args, **options)

            return set_timer

        own = {name: watched(original) for name, original in originals.items()}
        vars(loop).update(own)

        def restore() -> None:
            """Of several workers on the loop, in whatever order they end; one in the middle of them stays, blind."""
            nonlocal watching
            watching = False
            for name in originals:
                if vars(loop).get(name) is own[name]:
                    del vars(loop)[name]
                    vars(loop).update({name: former[name]} if name in former else {})

        return restore


def _is_own(callback: Callable[..., object]) -> bool:
    owner = type(getattr(callback, "__self__", None)).__module__
    return owner.startswith("perdure.") or str(getattr(callback, "__module__", "")).startswith("perdure.")


def _caller() -> tuple[str, str]:
    """What of asyncio was called, and the line of the author's code that called it."""
    frame = sys._getframe(1)
    what = "a timer of the event loop"
    while frame.f_code.co_filename.startswith(_ASYNCIO) or _OWN in frame.f_code.co_filename:
        if frame.f_code.co_filename.startswith(_ASYNCIO):
            name = frame.f_code.co_name
            if name in ("sleep", "wait_for", "wait"):
                what = f"asyncio.{name}()"
            elif os.path.basename(frame.f_code.co_filename) == "timeouts.py" and what.startswith("a timer"):
                what = "asyncio.timeout()"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return what, f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
