"""The crash explorer: a workflow is run again and again, and crashed at each place where it matters, one after another.

Those places are its durable boundaries: before a step's body, after it, and before and after each commit. A run that is
crashed at the n-th of them goes on from its last checkpoint, and must come to the same end as one that isn't; when a
run comes to its end before its n-th boundary, all have been tried. So what a crash moves (which outcomes commit
together) needn't be known beforehand.

In this process a crash ends the worker's runs at once: what they haven't written yet is gone, their code unwinds, the
workflows are pending again. With `kill` the worker is a process of its own and kills itself with SIGKILL; then its
lease runs out, and the worker of this process takes over.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Protocol, Self, cast
from uuid import UUID

from perdure import telemetry
from perdure.app import App
from perdure.authoring.workflows import Invocation
from perdure.errors import RunEnded
from perdure.handle import Handle
from perdure.model.records import WorkflowInfo
from perdure.model.statuses import Status
from perdure.testing.clock import Clock

Drive = Callable[[Handle[Any]], Awaitable[object]]
Same = Callable[[Any, Any], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class CrashReport:
    """What `crash_everywhere` has tried.

    Attributes:
        boundaries: Where it crashed the workflow, in order.
        reran: Steps whose bodies ran again after a crash although they aren't declared idempotent: what they do may be
            done twice. Make it harmless (`current().idempotency_key` helps), and say `@step(idempotent=True)`.
    """

    boundaries: tuple[str, ...]
    reran: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.boundaries)} crashes, and each time the same end:"]
        lines += [f"  {boundary}" for boundary in self.boundaries]
        if self.reran:
            lines.append(f"bodies that ran twice, and aren't declared idempotent: {', '.join(self.reran)}")
        return "\n".join(lines)


class CrashFailure(AssertionError):
    """Some crashes changed the end of a workflow.

    Attributes:
        failures: What happened, a line for each.
    """

    def __init__(self, failures: tuple[str, ...]) -> None:
        super().__init__(failures)
        self.failures = failures

    def __str__(self) -> str:
        return "\n".join(self.failures)


class Stage(Protocol):
    """What the explorer needs of a kit."""

    app: App
    clock: Clock
    database_url: str
    schema: str

    @property
    def lease(self) -> timedelta: ...
    async def finish(self, handle: Handle[Any]) -> Any: ...
    async def start_worker(self) -> None: ...
    async def stop_worker(self) -> None: ...
    def crash(self) -> None: ...


class Boundaries:
    """Counts the durable boundaries that are reached, and the bodies that run; `crash` is called at the n-th."""

    def __init__(self, at: int, crash: Callable[[str], None]) -> None:
        self.where = ""
        """The boundary at which it crashed; empty: it wasn't reached."""
        self.bodies: Counter[tuple[UUID, str, int]] = Counter()
        self.risky: set[str] = set()
        self._at = at
        self._crash = crash
        self._count = 0
        self._flushes = 0
        self._unsubscribe: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        self._unsubscribe = telemetry.subscribe(self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unsubscribe()

    @property
    def reran(self) -> set[str]:
        """The names of steps of which one attempt ran twice, and nobody says that it may."""
        return {_name(key) for (_, key, _), times in self.bodies.items() if times > 1 and key in self.risky}

    def _hear(self, event: telemetry.Event) -> None:
        where = self._boundary(event)
        if where is None:
            return
        self._count += not self.where
        crashes = self._count == self._at and not self.where
        if isinstance(event, telemetry.StepStarted) and not crashes:
            self.bodies[event.workflow_id, event.key, event.attempt] += 1
            if not event.idempotent:
                self.risky.add(event.key)
        if crashes:
            self.where = where
            self._crash(where)
            if isinstance(event, telemetry.StepStarted | telemetry.StepEnded):
                raise RunEnded  # in its own code; the writer goes on

    def _boundary(self, event: telemetry.Event) -> str | None:
        match event:
            case telemetry.StepStarted():
                return f"before step {event.key!r} (attempt {event.attempt})"
            case telemetry.StepEnded():
                return f"after step {event.key!r} (attempt {event.attempt})"
            case telemetry.FlushBegins():
                self._flushes += 1
                return f"before commit {self._flushes}"
            case telemetry.FlushCommitted():
                return f"after commit {self._flushes}"
            case _:
                return None


async def explore(
    stage: Stage, invocation: Invocation[Any], *, drive: Drive | None, same: Same, kill: bool, most: int
) -> CrashReport:
    """Crash it at each boundary.

    Raises:
        CrashFailure: A crash changed its end.
        TimeoutError: It doesn't come to an end.
    """
    invocation.taken()
    if kill and drive is not None:
        raise ValueError("kill=True runs the worker in a process of its own, and takes no drive=; use one of them")
    once = _Killing(stage, invocation) if kill else _InProcess(stage, invocation, drive)
    boundaries: list[str] = []
    reran: dict[str, None] = {}
    failures: list[str] = []
    async with once:
        expected = (await once.run(0)).end
        for at in range(1, most + 1):
            tried = await once.run(at)
            reran.update(dict.fromkeys(sorted(tried.reran)))
            if not tried.where:
                break
            boundaries.append(tried.where)
            if not _is_same(expected, tried.end, same):
                failures.append(
                    f"crashed {tried.where}: it ended {_said(tried.end)}; without a crash {_said(expected)}"
                )
        else:
            failures.append(f"it has more than {most} boundaries; try a smaller case, or set most=")
    if failures:
        raise CrashFailure(tuple(failures))
    return CrashReport(boundaries=tuple(boundaries), reran=tuple(reran))


@dataclass(frozen=True, slots=True)
class _Tried:
    """One run: where it was crashed (empty: nowhere), how it ended, and which steps ran twice."""

    where: str
    end: WorkflowInfo
    reran: set[str]


class _InProcess:
    """Crashes the runs of this process's worker."""

    def __init__(self, stage: Stage, invocation: Invocation[Any], drive: Drive | None) -> None:
        self._stage = stage
        self._invocation = invocation
        self._drive = drive

    async def __aenter__(self) -> None: ...
    async def __aexit__(self, *exc: object) -> None: ...

    async def run(self, at: int) -> _Tried:
        stage = self._stage
        with Boundaries(at, lambda _: stage.crash()) as boundaries:
            handle = await stage.app.start(self._invocation)
            if self._drive is not None:
                await self._drive(handle)
            end = await _end(stage, handle)
        return _Tried(boundaries.where, end, boundaries.reran)


class _Killing:
    """Lets a worker in a process of its own kill itself."""

    def __init__(self, stage: Stage, invocation: Invocation[Any]) -> None:
        self._stage = stage
        self._invocation = invocation
        self._module, self._attribute = importable(stage.app)

    async def __aenter__(self) -> None:
        await self._stage.stop_worker()

    async def __aexit__(self, *exc: object) -> None:
        await self._stage.start_worker()

    async def run(self, at: int) -> _Tried:
        stage = self._stage
        handle = await stage.app.start(self._invocation)
        heard = await self._victim(handle.id, at)
        where = next((line["where"] for line in heard if "where" in line), "")
        if where:
            await stage.start_worker()
            await stage.clock.advance(stage.lease, settle=False)
        with Boundaries(0, lambda _: None) as boundaries:
            for line in heard:
                if "body" in line:
                    key, attempt, idempotent = line["body"]
                    boundaries.bodies[handle.id, key, attempt] += 1
                    boundaries.risky |= set() if idempotent else {key}
            end = await _end(stage, handle) if where else await handle.describe()
        if where:
            await stage.stop_worker()
        return _Tried(where, end, boundaries.reran)

    async def _victim(self, id: UUID, at: int) -> list[dict[str, Any]]:
        """Run a worker until it has killed itself, or ended the workflow; returns what it said."""
        stage = self._stage
        order = {
            "module": self._module,
            "app": self._attribute,
            "database_url": stage.database_url,
            "schema": stage.schema,
            "lease": stage.lease.total_seconds(),
            "workflow_id": str(id),
            "at": at,
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "perdure.testing.victim",
            json.dumps(order),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
        said, complaints = await process.communicate()
        if process.returncode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"the worker process failed:\n{complaints.decode(errors='replace')}")
        return [json.loads(line) for line in said.splitlines() if line.startswith(b"{")]


def importable(app: App) -> tuple[str, str]:
    """The module and the name under which another process can import an app.

    Raises:
        ValueError: It isn't the global of a module.
    """
    for name, module in list(sys.modules.items()):
        for attribute, value in list(getattr(module, "__dict__", {}).items()) if name != "__main__" else ():
            if value is app:
                return name, attribute
    raise ValueError(
        f"kill=True runs the worker in a process of its own, which imports app {app.name!r}; make the app the global "
        "of a module that can be imported"
    )


async def _end(stage: Stage, handle: Handle[Any]) -> WorkflowInfo:
    try:
        await stage.finish(handle)
    except TimeoutError:
        if not (await handle.describe()).status.is_final:
            raise
    except Exception:
        pass  # how it ended: that is what is compared
    return await handle.describe()


def _is_same(one: WorkflowInfo, other: WorkflowInfo, same: Same) -> bool:
    if one.status is not other.status:
        return False
    if one.status is Status.SUCCESS:
        return same(one.output, other.output)
    return _kind(one) == _kind(other)


def _kind(info: WorkflowInfo) -> tuple[Any, Any]:
    error: Any = info.error
    record = cast("dict[str, Any]", error) if isinstance(error, dict) else {}
    return record.get("type"), record.get("message")


def _said(info: WorkflowInfo) -> str:
    if info.status is Status.SUCCESS:
        return f"with {info.output!r}"
    return f"in {info.status.value}: {': '.join(map(str, _kind(info)))}"


def _name(key: str) -> str:
    return key.rpartition("/")[2].partition("#")[0]


def victim_boundaries(at: int) -> AbstractContextManager[Boundaries]:
    """In the process that is to die: tells what it does on stdout, and kills itself at the n-th boundary."""

    def die(where: str) -> None:
        _tell({"where": where})
        os.kill(os.getpid(), signal.SIGKILL)

    class Telling(Boundaries):
        def _hear(self, event: telemetry.Event) -> None:
            before = self.bodies.total()
            super()._hear(event)
            if isinstance(event, telemetry.StepStarted) and self.bodies.total() > before:
                _tell({"body": [event.key, event.attempt, event.idempotent]})

    return Telling(at, die)


def _tell(line: dict[str, Any]) -> None:
    os.write(1, json.dumps(line).encode() + b"\n")
