"""What the simulated processes do, and what they must not get wrong: the workload and its oracle.

Each outcome that a workflow's code gets is a token that exists once. A run notes its tokens in the order in which its
code gets them: its path. Each effect is noted with the path that its call stood on. Whatever happens,

- the path of an effect is a beginning of the path that the workflow ends with (barrier, order, replay);
- what an effect stands on is durable when it begins;
- the end that is recorded is one that some run came to;
- no worker runs more workflows at the same time than it may, no workflow more steps, and none is tried more often.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any
from uuid import UUID

import perdure
from perdure import App, Retry, current, recv, saga, sleep, step

PATH: ContextVar[list[str]] = ContextVar("PATH")
BASE: ContextVar[tuple[str, ...]] = ContextVar("BASE", default=())

_ATTEMPTS = 3
_SOON = Retry(max_attempts=None, initial=timedelta(milliseconds=200), maximum=timedelta(seconds=2), jitter=0.0)


class Broken(AssertionError):
    """An invariant doesn't hold."""


@dataclass(slots=True)
class Effect:
    """What the body of a step did."""

    workflow_id: UUID
    name: str
    attempt: int
    base: tuple[str, ...]
    token: str
    process: str
    at: float


@dataclass
class World:
    """What all processes share outside the database: the oracle, and what was seen."""

    durable: Callable[[UUID, tuple[str, ...]], bool]
    """Whether these tokens are recorded, as anybody can read it now."""
    time: Callable[[], float]
    checks: bool = True
    effects: list[Effect] = field(default_factory=list)
    numbers: Any = field(default_factory=itertools.count)
    complaints: list[str] = field(default_factory=list)
    runs: Counter[UUID] = field(default_factory=Counter)
    mended: set[UUID] = field(default_factory=set)
    """The workflows whose cause of failure is gone."""
    concurrency: int = 10
    """How many workflows a worker may run at the same time."""
    under_way: defaultdict[str, Counter[UUID]] = field(default_factory=lambda: defaultdict(Counter))
    """How many bodies of which workflows run in each process."""

    def effect(self, name: str, process: str) -> str:
        """A step's body does something that can't be undone."""
        now = current()
        base = BASE.get()
        token = f"{name}:{next(self.numbers)}"
        self.effects.append(Effect(now.id, name, now.attempt, base, token, process, self.time()))
        made = tuple(each for each in base if not each.startswith("="))
        if self.checks and not self.durable(now.id, made):
            self.complaints.append(f"the body of {name!r} of {now.id} began on outcomes that aren't durable: {made}")
        return token

    @contextmanager
    def body(self, process: str, *, beside: int = 10) -> Iterator[None]:
        """A step's body that takes its time, of so many of its workflow that may run beside each other."""
        id, bodies = current().id, self.under_way[process]
        bodies[id] += 1
        if len(bodies) > self.concurrency:
            self.complaints.append(f"{len(bodies)} workflows run in {process}, and {self.concurrency} may: {[*bodies]}")
        if bodies[id] > beside:
            self.complaints.append(f"{bodies[id]} bodies of {id} run beside each other, and {beside} may")
        try:
            yield
        finally:
            bodies[id] -= 1
            if not bodies[id]:
                del bodies[id]


def got(token: str) -> str:
    """The code gets an outcome."""
    PATH.get().append(token)
    return token


async def act(doing: Any, *args: Any) -> str:
    """Call a step, and note what it stands on and gives."""
    BASE.set(tuple(PATH.get()))
    return got(await doing(*args))


class Flaky(Exception):
    """What some steps fail with."""


def declare(world: World, process: str, session: Callable[[], AbstractAsyncContextManager[Any]]) -> App:
    """The app of one process: every process has the same code. Its transactional steps have connections from there."""
    app = App("simulated", schema="perdure", database_url="host=/simulated", errors=[Flaky], version="1")

    @step
    async def effect(name: str) -> str:
        return world.effect(name, process)

    @step
    async def slow(name: str, seconds: float) -> str:
        with world.body(process):
            token = world.effect(name, process)
            await asyncio.sleep(seconds)
            return token

    @step
    async def scarce(name: str, seconds: float) -> str:
        with world.body(process, beside=2):
            token = world.effect(name, process)
            await asyncio.sleep(seconds)
            return token

    @step(retry=_SOON)
    async def flaky(name: str, failures: int) -> str:
        token = world.effect(name, process)
        if current().attempt <= failures:
            raise Flaky(name)
        return token

    @step(retry=replace(_SOON, max_attempts=_ATTEMPTS))
    async def futile(name: str) -> str:
        world.effect(name, process)
        if current().attempt > _ATTEMPTS:
            world.complaints.append(f"{name!r} of {current().id} is tried {current().attempt} times")
        raise Flaky(name)

    @step
    async def fragile(name: str) -> str:
        token = world.effect(name, process)
        if current().id not in world.mended:
            raise Flaky(name)
        return token

    @step
    async def capricious(name: str, attempts: int) -> str:
        token = world.effect(name, process)
        if sum(each.workflow_id == current().id and each.name == name for each in world.effects) < attempts:
            raise Flaky(name)
        return token

    @app.transaction(using=session)
    async def pay(connection: Any, name: str) -> str:
        with world.body(process):
            token = world.effect(name, process)
            row = (current().id, token)
            await connection.execute("INSERT INTO perdure.ledger (workflow_id, token) VALUES ($1, $2)", row)
            return token

    def begin() -> list[str]:
        path: list[str] = []
        PATH.set(path)
        world.runs[current().id] += 1
        return path

    @app.workflow
    async def chain(steps: int, pauses: list[float]) -> list[str]:
        """Steps one after the other, with waits between them."""
        path = begin()
        for number in range(steps):
            await act(effect, f"step{number}")
            if number < len(pauses):
                await sleep(timedelta(seconds=pauses[number]))
        return path

    @app.workflow
    async def steady(steps: int, seconds: float) -> list[str]:
        """Steps one after the other, each of which takes its time."""
        path = begin()
        for number in range(steps):
            await act(slow, f"steady{number}", seconds)
        return path

    @app.workflow
    async def wide(width: int, seconds: float) -> list[str]:
        """Steps beside each other, and a race."""
        path = begin()
        async with asyncio.TaskGroup() as group:
            for number in range(width):
                group.create_task(act(slow, f"wide{number}", seconds * (number % 3)))
        first = asyncio.create_task(act(slow, "hare", seconds))
        second = asyncio.create_task(act(slow, "tortoise", seconds * 2))
        done, _ = await asyncio.wait({first, second}, return_when=asyncio.FIRST_COMPLETED)
        await act(effect, "hare won" if first in done else "tortoise won")
        await asyncio.gather(first, second)
        return path

    @app.workflow
    async def rationed(width: int, seconds: float) -> list[str]:
        """Steps beside each other, two at a time."""
        path = begin()

        async def one(number: int) -> None:
            await act(scarce, f"rationed{number}", seconds * (number % 3))

        await perdure.map(one, range(width), concurrency=2)
        return path

    @app.workflow
    async def stubborn(failures: int) -> list[str]:
        """A step that fails a few times."""
        path = begin()
        await act(flaky, "flaky", failures)
        await act(effect, "after")
        return path

    @app.workflow
    async def resigned() -> list[str]:
        """A step that fails as often as it may."""
        path = begin()
        try:
            await act(futile, "futile")
        except Flaky:
            got("=failed")
        await act(effect, "after")
        return path

    @app.workflow
    async def listener(count: int, pause: float) -> list[Any]:
        """Messages, each followed by a step."""
        path = begin()
        if pause:
            await sleep(timedelta(seconds=pause))
        heard: list[int] = []
        for _ in range(count):
            number = await recv("numbers", type=int)
            heard.append(number)
            got(f"={number}")
            await act(effect, f"heard{number}")
        return [path, heard]

    @app.workflow
    async def leaf(number: int, pause: float) -> str:
        """A child."""
        begin()
        token = await act(effect, f"leaf{number}")
        if pause:
            await sleep(timedelta(seconds=pause))
        return token

    @app.workflow
    async def family(size: int, pause: float) -> list[str]:
        """Children, awaited together."""
        path = begin()
        await act(effect, "before the children")
        tokens = await asyncio.gather(*(leaf(number, pause * number) for number in range(size)))
        for token in tokens:
            got(f"={token}")
        await act(slow, "after the children", 0.2)
        return path

    @app.workflow
    async def trip(pause: float) -> list[str]:
        """What was done is undone when it is cancelled, and that can be interrupted too."""
        path = begin()
        try:
            async with saga(retry=_SOON) as undo:
                await act(effect, "book")
                undo.compensate(flaky, "unbook", 1)
                await sleep(timedelta(seconds=pause))
                await act(effect, "travel")
        except asyncio.CancelledError:
            got("=cancelled")
            await act(slow, "told", 0.5)
            return path
        return path

    @app.workflow
    async def recalled(pause: float) -> list[str]:
        """It does one thing where it is cancelled in time, and another thing beside it."""
        path = begin()
        await act(effect, "called")
        beside = asyncio.create_task(act(slow, "beside", 0.5))
        try:
            await sleep(timedelta(seconds=pause))
            got("=slept")
        except asyncio.CancelledError:
            got("=cancelled")
            await act(slow, "told", 0.5)
        await beside
        return path

    @app.workflow
    async def hurried(pause: float) -> list[str]:
        """It doesn't wait for its child for long."""
        path = begin()
        try:
            async with perdure.timeout(timedelta(seconds=pause)):
                await leaf(0, 60.0)
        except TimeoutError:
            got("=late")
        await sleep(timedelta(seconds=6))
        await act(effect, "went on")
        return path

    @app.workflow
    async def limited(pause: float) -> list[str]:
        """Something that takes too long."""
        path = begin()
        try:
            async with perdure.timeout(timedelta(seconds=pause)):
                await sleep(timedelta(seconds=60))
        except TimeoutError:
            got("=late")
        await act(effect, "gave up")
        return path

    @app.workflow
    async def lap(number: int, laps: int) -> list[str]:
        """It begins anew, again and again."""
        path = begin()
        await act(effect, f"lap{number}")
        if number + 1 < laps:
            await perdure.continue_as_new(lap(number + 1, laps))
        return path

    @app.workflow
    async def courier(to: str, count: int) -> list[str]:
        """Sends messages from a workflow."""
        path = begin()
        for number in range(count):
            await act(effect, f"pack{number}")
            await perdure.send(UUID(to), "numbers", number)
        return path

    @app.workflow
    async def broken() -> list[str]:
        """It fails, until an operator has mended the cause, and resumes it."""
        path = begin()
        await act(effect, "before")
        await act(fragile, "fragile")
        await act(effect, "after")
        return path

    @app.workflow(retry=Retry(max_attempts=4, initial=timedelta(seconds=0.3), jitter=0.0))
    async def tried(attempts: int) -> list[str]:
        """It fails as a whole, a few times."""
        path = begin()
        await act(effect, "before")
        await act(capricious, "capricious", attempts)
        return path

    @app.workflow
    async def writer(count: int) -> list[str]:
        """Writes to a stream."""
        path = begin()
        for number in range(count):
            await act(effect, f"write{number}")
            await perdure.write_stream("lines", path[-1])
        return path

    @app.workflow
    async def oracle(answers: int) -> list[str]:
        """Answers questions, and says so in an event."""
        path = begin()
        for number in range(answers):
            async with perdure.answering("questions", type=int) as question:
                got(f"={question.value}")
                question.reply(await act(effect, f"answer{number}"))
        await perdure.set_event("answered", answers)
        await act(effect, "answered")
        return path

    @app.workflow
    async def mixed(seconds: float) -> list[str]:
        """A step that takes its time, beside a wait."""
        path = begin()

        async def wait() -> None:
            await sleep(timedelta(seconds=seconds * 2))
            got("=slept")

        await asyncio.gather(act(slow, "slow", seconds), wait())
        await act(effect, "after")
        return path

    @app.workflow
    async def torn(seconds: float) -> list[str]:
        """A message, while a step takes its time."""
        path = begin()

        async def hear() -> None:
            got(f"={await recv('numbers', type=int)}")
            await act(effect, "heard")

        await asyncio.gather(act(slow, "slow", seconds), hear())
        return path

    @app.workflow
    async def payer(count: int) -> list[str]:
        """Writes into tables of its own, each time together with its checkpoint."""
        path = begin()
        await act(slow, "counted", 0.3)
        for number in range(count):
            await act(pay, f"pay{number}")
        await act(effect, "paid")
        return path

    @app.workflow
    async def curious(of: str) -> list[Any]:
        """Waits for an event of another workflow."""
        path = begin()
        answers = await perdure.get_event(UUID(of), "answered", type=int)
        got(f"={answers}")
        await act(effect, "knows")
        return path

    return app
