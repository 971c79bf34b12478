"""The crash explorer: a workflow is run again and again, and crashed at each place where it matters, one after another.

Those places are its durable boundaries: before a step's body, after it, and before and after each commit. A first run
passes them all; then one is crashed at each of them, goes on from its last checkpoint, and must come to the same end as
the first. Where tasks race, no two runs need pass their boundaries in the same order, nor commit the same outcomes
together. So each boundary has a name, what only a later run passes is tried as well, and what isn't passed any more is
left out.

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
Boundary = tuple[str, int]
"""What happens there, and for the how-manieth time."""

_TELLS_THE_TIME = "perdure.errors.DeadlineExceeded"


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
    """Notes the durable boundaries that are passed, and the bodies that run; `crash` is called at one of them."""

    def __init__(self, at: Boundary | None, crash: Callable[[str], None]) -> None:
        self.where = ""
        """The boundary at which it crashed; empty: it wasn't reached."""
        self.passed: list[Boundary] = []
        """Those before it, in order."""
        self.bodies: Counter[tuple[str, int]] = Counter()
        self.risky: set[str] = set()
        self._at = at
        self._crash = crash
        self._times: Counter[str] = Counter()
        self._flushes = 0
        self._unsubscribe: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        self._unsubscribe = telemetry.subscribe(self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unsubscribe()

    def reran(self, calm: Counter[tuple[str, int]]) -> set[str]:
        """The names of steps of which one attempt ran more often than without a crash, and nobody says that it may."""
        return {
            _name(key)
            for (key, attempt), times in self.bodies.items()
            if key in self.risky and times > max(1, calm[key, attempt])
        }

    def _hear(self, event: telemetry.Event) -> None:
        where = self._boundary(event)
        if where is None:
            return
        self._times[where] += 1
        here = (where, self._times[where])
        crashes = here == self._at
        if not self.where and not crashes:
            self._passes(here)
        if isinstance(event, telemetry.StepStarted) and not crashes:
            self.bodies[event.key, event.attempt] += 1
            if not event.idempotent:
                self.risky.add(event.key)
        if crashes:
            self.where = where
            self._crash(where)
            if isinstance(event, telemetry.StepStarted | telemetry.StepEnded):
                raise RunEnded  # in its own code; the writer goes on

    def _passes(self, here: Boundary) -> None:
        self.passed.append(here)

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
        calm = await once.run(None)
        expected = calm.end
        known = list(calm.seen.passed)
        for at in known:  # it grows meanwhile
            if len(boundaries) == most:
                failures.append(f"it has more than {most} boundaries; try a smaller case, or set most=")
                break
            tried = await once.run(at)
            known += [each for each in tried.seen.passed if each not in known]
            if not tried.where:
                continue
            reran.update(dict.fromkeys(sorted(tried.seen.reran(calm.seen.bodies))))
            boundaries.append(tried.where)
            if not _is_same(expected, tried.end, same):
                failures.append(
                    f"crashed {tried.where}: it ended {_said(tried.end)}; without a crash {_said(expected)}"
                )
    if failures:
        raise CrashFailure(tuple(failures))
    return CrashReport(boundaries=tuple(boundaries), reran=tuple(reran))


@dataclass(frozen=True, slots=True)
class _Tried:
    """One run: where it was crashed (empty: nowhere), how it ended, and what was seen of it."""

    where: str
    end: WorkflowInfo
    seen: Boundaries


class _InProcess:
    """Crashes the runs of this process's worker."""

    def __init__(self, stage: Stage, invocation: Invocation[Any], drive: Drive | None) -> None:
        self._stage = stage
        self._invocation = invocation
        self._drive = drive

    async def __aenter__(self) -> None: ...
    async def __aexit__(self, *exc: object) -> None: ...

    async def run(self, at: Boundary | None) -> _Tried:
        stage = self._stage
        with Boundaries(at, lambda _: stage.crash()) as boundaries:
            handle = await stage.app.start(self._invocation)
            if self._drive is not None:
                await self._drive(handle)
            end = await _end(stage, handle)
        return _Tried(boundaries.where, end, boundaries)


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

    async def run(self, at: Boundary | None) -> _Tried:
        stage = self._stage
        handle = await stage.app.start(self._invocation)
        heard = await self._victim(handle.id, at)
        where = next((line["where"] for line in heard if "where" in line), "")
        if where:
            await stage.start_worker()
            await stage.clock.advance(stage.lease, settle=False)
        with Boundaries(None, lambda _: None) as boundaries:
            for line in heard:
                if "body" in line:
                    key, attempt, idempotent = line["body"]
                    boundaries.bodies[key, attempt] += 1
                    boundaries.risky |= set() if idempotent else {key}
            end = await _end(stage, handle) if where else await handle.describe()
        boundaries.passed = [(what, times) for line in heard if "passed" in line for what, times in [line["passed"]]]
        if where:
            await stage.stop_worker()
        return _Tried(where, end, boundaries)

    async def _victim(self, id: UUID, at: Boundary | None) -> list[dict[str, Any]]:
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
        try:
            said, complaints = await process.communicate()
        finally:
            if process.returncode is None:  # the test was cancelled
                process.kill()
        if process.returncode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"the worker process failed:\n{complaints.decode(errors='replace')}")
        return [json.loads(line) for line in said.splitlines()]


def importable(app: App) -> tuple[str, str]:
    """The module and the name under which another process can import an app.

    Raises:
        ValueError: It isn't the global of a module.
    """
    found = [
        (name, attribute)
        for name, module in list(sys.modules.items())
        if name != "__main__"
        for attribute, value in list(getattr(module, "__dict__", {}).items())
        if value is app
    ]
    homes = {workflow.fn.__module__ for workflow in app.workflow_functions.values()}
    for place in sorted(found, key=lambda place: place[0] not in homes):  # rather than a test that imports it
        return place
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
    kind = record.get("type")
    return kind, None if kind == _TELLS_THE_TIME else record.get("message")


def _said(info: WorkflowInfo) -> str:
    if info.status is Status.SUCCESS:
        return f"with {info.output!r}"
    return f"in {info.status.value}: {': '.join(str(part) for part in _kind(info) if part is not None)}"


def _name(key: str) -> str:
    return key.rpartition("/")[2].partition("#")[0]


def victim_boundaries(at: Boundary | None) -> AbstractContextManager[Boundaries]:
    """In the process that is to die: tells what it does on stdout, and kills itself at the n-th boundary.

    What the author's code prints goes to stderr.
    """
    told = os.dup(1)
    os.dup2(2, 1)

    def tell(line: dict[str, Any]) -> None:
        os.write(told, json.dumps(line).encode() + b"\n")

    def die(where: str) -> None:
        tell({"where": where})
        os.kill(os.getpid(), signal.SIGKILL)

    class Telling(Boundaries):
        def _passes(self, here: Boundary) -> None:
            tell({"passed": here})

        def _hear(self, event: telemetry.Event) -> None:
            before = self.bodies.total()
            super()._hear(event)
            if isinstance(event, telemetry.StepStarted) and self.bodies.total() > before:
                tell({"body": [event.key, event.attempt, event.idempotent]})

    return Telling(at, die)
