"""What it costs to know which step is which, and to hand out outcomes in order: CPU time of this process, a step.

The engine alone, with a writer that takes no notes: whole workflows of pure steps without any work in them. Compared
with the same tasks whose outcomes aren't put in order, and with the same coroutines called plainly. All of it on the
event loop that a worker's process has, and with the garbage collector set as it sets it.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import uvloop

from benchmarks.bench import Bench
from benchmarks.figures import Figure
from perdure.authoring.steps import step
from perdure.authoring.workflows import Workflow
from perdure.cli.worker import collect_rarely
from perdure.engine import scopes
from perdure.engine.alarms import Alarms
from perdure.engine.delivery import Delivery
from perdure.engine.run import Run
from perdure.engine.threads import Threads
from perdure.failures import Catalogue
from perdure.model.ids import new_id
from perdure.model.records import Checkpoint, Claim

STEPS = 2_000
RUNS = 20
PASSES = 9
"""A pass takes a tenth of a second, in which others take the machine now and then: of so many, the median counts."""
CONCURRENCY = 100  # of a worker, unless it is told otherwise

Call = Callable[[int], Awaitable[int]]
Shape = Callable[[Call, int], Awaitable[None]]


async def _plain(number: int) -> int:
    return number


_step = step(name="step", pure=True)(_plain)


async def _one_task(call: Call, steps: int) -> None:
    for number in range(steps):
        await call(number)


async def _ten_tasks(call: Call, steps: int) -> None:
    await asyncio.gather(*(_one_task(call, steps // 10) for _ in range(10)))


async def _a_task_each(call: Call, steps: int) -> None:
    await asyncio.gather(*(call(number) for number in range(steps)))


async def _groups_of_tasks(call: Call, steps: int) -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(5):
            group.create_task(_ten_tasks(call, steps // 5))


SHAPES: dict[str, Shape] = {
    "one task": _one_task,
    "10 tasks": _ten_tasks,
    "a task each": _a_task_each,
    "5 groups of 10 tasks": _groups_of_tasks,
}


def measure(bench: Bench) -> list[Figure]:
    with _as_in_a_worker():
        return _figures(bench)


def _figures(bench: Bench) -> list[Figure]:
    figures: list[Figure] = []
    for name, shape in SHAPES.items():
        for runs, suffix in ((1, ""), (RUNS, f", {RUNS} workflows at once")):
            seen = [_repetition(shape, runs) for _ in range(bench.repeats)]
            plain, ordered, order = zip(*seen, strict=True)
            title = f"{name}{suffix}"
            figures += [
                Figure(name=f"{title}: plain", unit="µs/step", values=plain, better="less"),
                Figure(name=f"{title}: in workflows", unit="µs/step", values=ordered, better="less"),
                Figure(name=f"{title}: of which order", unit="µs/step", values=order, better="less", target=10),
            ]
    return figures


def _repetition(shape: Shape, runs: int) -> tuple[float, float, float]:
    """What a step takes plainly, what it takes in workflows, and how much of that is order."""
    plain, ordered, order = list[float](), list[float](), list[float]()
    for _ in range(PASSES):
        plain.append(_run(_plainly(shape, runs)))
        with _out_of_order():
            unordered = _run(_in_workflows(shape, runs))
        ordered.append(_run(_in_workflows(shape, runs)))
        order.append(ordered[-1] - unordered)
    return statistics.median(plain), statistics.median(ordered), statistics.median(order)


def _run(code: Coroutine[Any, Any, float]) -> float:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(code)


async def _plainly(shape: Shape, runs: int) -> float:
    return await _microseconds(lambda: shape(_plain, STEPS // runs), runs)


async def _in_workflows(shape: Shape, runs: int) -> float:
    async def flow() -> None:
        await shape(_step, STEPS // runs)

    host = _Host(Workflow(flow, name="flow"))
    restore = scopes.install(host.loop)
    try:
        return await _microseconds(host.run, runs)
    finally:
        restore()


async def _microseconds(code: Callable[[], Awaitable[object]], runs: int) -> float:
    """The CPU time of so many at once, a step; after one that isn't counted."""
    await code()
    gc.collect()
    began = time.process_time()
    await asyncio.gather(*(code() for _ in range(runs)))
    return (time.process_time() - began) * 1e6 / STEPS


@contextmanager
def _as_in_a_worker() -> Generator[None]:
    """Collect garbage as rarely as a worker does."""
    former = gc.get_threshold()
    collect_rarely(CONCURRENCY)
    try:
        yield
    finally:
        gc.unfreeze()
        gc.set_threshold(*former)


@contextmanager
def _out_of_order() -> Generator[None]:
    """Every task of a workflow gets its outcome at once, as if it were the only one."""
    usual = Delivery.is_simple
    Delivery.is_simple = property(lambda delivery: True)  # type: ignore[assignment]
    try:
        yield
    finally:
        Delivery.is_simple = usual  # type: ignore[method-assign]


class _Host:
    """Runs workflows without a database."""

    transactions: Any = None
    suspends_from = 1.0
    codec = None
    max_payload = 1024
    draining = False
    version = "1"

    def __init__(self, workflow: Workflow[..., Any]) -> None:
        self.loop = asyncio.get_running_loop()
        self.writer: Any = self
        self.threads = Threads(1)
        self.alarms = Alarms(self.loop)
        self.catalogue = Catalogue()
        self._workflow = workflow
        self._ended: dict[UUID, asyncio.Future[str]] = {}

    async def run(self) -> None:
        id = new_id()
        ended = self._ended[id] = self.loop.create_future()
        claim = Claim(
            workflow_id=id, name="flow", worker_id=id, epoch=1, input="{}", started_at=datetime.now(UTC)
        )  # fmt: skip
        Run(self, claim, self._workflow).start()
        assert await ended == "success"

    def time(self) -> datetime:
        return datetime.now(UTC)

    # --- the writer ------------------------------------------------------------------------------------------------

    def record(self, run: Any, checkpoint: Checkpoint, *, is_patient: bool = False) -> None:
        run.written(1)

    def complete(self, run: Any, status: str, payload: str) -> None:
        self._ended.pop(run.id).set_result(status)

    def hurry(self) -> None: ...
    def put_off(self, run: Any, key: str, seconds: float, position: int) -> None: ...
    def suspend(self, run: Any, suspension: Any) -> None: ...
    def discard(self, run: Any) -> None: ...

    # --- what runs tell --------------------------------------------------------------------------------------------

    def code_ended(self, run: Run) -> None: ...
    def run_ended(self, run: Run, status: str, payload: str) -> None: ...
    def run_suspended(self, run: Run, waiting_for: str, seconds: float | None) -> None: ...
    def run_awoken(self, run: Run) -> None: ...
    def run_lost(self, run: Run, reason: str) -> None: ...
    def run_handed_over(self, run: Run) -> None: ...
