"""The clients of a seed: they start workflows, send, cancel, resume, and know how each must end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import timedelta
from itertools import count
from random import Random
from typing import Any

from perdure import App
from perdure.errors import DatabaseUnavailable, DeadlineExceeded, WorkflowCancelled, WorkflowNotFound, WrongState
from perdure.handle import Handle
from simulation.books import Books
from simulation.loop import PROCESS, Process
from simulation.seen import LEASE
from simulation.server import Fate
from simulation.storm import Storm
from simulation.world import Broken, Flaky


class Client:
    """What client processes do; also those that live in a worker's process.

    Some wait for the moment at which a fault hurts, and ask the storm for it.
    """

    def __init__(self, chance: Random, books: Books, app: Callable[[Process], App], storm: Storm) -> None:
        self.chance = chance
        self.books = books
        self._app = app
        self._storm = storm
        self._numbers = count(1)

    async def work(self) -> None:
        """Start some workflows, and see what becomes of them."""
        app = self._app(PROCESS.get())
        chance = self.chance
        known = app.workflow_functions
        jobs: list[Coroutine[Any, Any, None]] = []
        for number in range(chance.randint(3, 7)):
            kind = chance.choice(
                (
                    "chain",
                    "wide",
                    "stubborn",
                    "listener",
                    "family",
                    "trip",
                    "recalled",
                    "hurried",
                    "limited",
                    "lap",
                    "courier",
                    "keyed",
                    "doomed",
                    "deadline",
                    "broken",
                    "tried",
                    "writer",
                    "oracle",
                    "mixed",
                    "payer",
                    "torn",
                    "listener",
                    "family",
                    "crowd",
                    "rationed",
                    "resigned",
                )
            )
            jobs.append(getattr(self, f"_{kind}")(app, known, number))
        tasks = []
        for job in jobs:
            await asyncio.sleep(chance.choice((0.0, 0.1, 1.0)))
            tasks.append(asyncio.ensure_future(job))
        await asyncio.gather(*tasks)

    async def _start(self, app: App, invocation: Callable[[], Any], key: str | None = None, **options: Any) -> Any:
        """Start it: acknowledged, or the caller tries again under the same key."""
        key = key or f"start{next(self._numbers)}"
        while True:
            try:
                handle = await app.start(invocation(), key=key, **options)
            except DatabaseUnavailable:
                continue
            self.books.acknowledged.add(handle.id)
            return handle

    async def _result(self, handle: Handle[Any]) -> Any:
        """Its result, which must be durable when anybody gets it."""
        while True:
            with suppress(DatabaseUnavailable):
                (result,) = await asyncio.gather(handle.result(), return_exceptions=True)
                if isinstance(result, DatabaseUnavailable | WorkflowNotFound):
                    raise result
                if not self.books.has_result(handle.id):
                    raise Broken(f"a result of {handle.id} was given out that isn't there")
                if isinstance(result, BaseException):
                    raise result
                return result

    async def _verb(self, verb: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            with suppress(DatabaseUnavailable):
                return await verb()

    async def _doer(self, handle: Handle[Any], name: str) -> str | None:
        """The worker that does this, once it does."""
        for _ in range(150):
            for effect in reversed(self.books.world.effects):
                if effect.workflow_id == handle.id and effect.name == name:
                    return effect.process
            await asyncio.sleep(0.02)
        return None

    async def _chain(self, app: App, known: Any, number: int) -> None:
        chance = self.chance
        pauses = [chance.choice((0.0, 0.05, 0.7, 3.0)) for _ in range(chance.randint(0, 3))]
        steps = chance.randint(1, 5)
        delay = chance.choice((None, timedelta(seconds=1)))
        handle = await self._start(app, lambda: known["chain"](steps, pauses), delay=delay)
        path = await self._result(handle)
        self.books.expect(handle, path, [f"step{each}" for each in range(steps)])

    async def _wide(self, app: App, known: Any, number: int) -> None:
        width, seconds = self.chance.randint(1, 5), self.chance.choice((0.0, 0.01, 0.8))
        handle = await self._start(app, lambda: known["wide"](width, seconds))
        path = await self._result(handle)
        self.books.expect(handle, path, None, count=width + 3)

    async def _rationed(self, app: App, known: Any, number: int) -> None:
        width, seconds = self.chance.randint(3, 6), self.chance.choice((0.0, 0.01, 0.3))
        handle = await self._start(app, lambda: known["rationed"](width, seconds))
        self.books.expect(handle, await self._result(handle), None, count=width)

    async def _stubborn(self, app: App, known: Any, number: int) -> None:
        failures = self.chance.randint(0, 3)
        handle = await self._start(app, lambda: known["stubborn"](failures))
        self.books.expect(handle, await self._result(handle), ["flaky", "after"])

    async def _resigned(self, app: App, known: Any, number: int) -> None:
        handle = await self._start(app, lambda: known["resigned"]())
        self.books.expect(handle, await self._result(handle), ["=failed", "after"])
        tried = {
            each.attempt for each in self.books.world.effects if each.workflow_id == handle.id and each.name == "futile"
        }
        if tried != {1, 2, 3} and not self.books.loses_tail:
            raise Broken(f"{handle.id} gave up after the attempts {tried}")

    async def _listener(self, app: App, known: Any, number: int) -> None:
        count, pause = self.chance.randint(1, 5), self.chance.choice((0.0, 0.0, 1.5))
        handle = await self._start(app, lambda: known["listener"](count, pause))
        for each in range(count):
            await asyncio.sleep(self.chance.choice((0.0, 0.001, 0.003, 0.3, 1.01)))
            if self.chance.random() < 0.2:
                self._storm.spoil(PROCESS.get().whole.name, ("send",), "silent", Fate(is_silent=True))
            await self._verb(lambda each=each: handle.send("numbers", each, idempotency_key=str(each)))  # type: ignore[misc]
        path, heard = await self._result(handle)
        if heard != list(range(count)):
            raise Broken(f"{handle.id} heard {heard} of {count} messages")
        self.books.expect(handle, path, None, count=2 * count)

    async def _courier(self, app: App, known: Any, number: int) -> None:
        count = self.chance.randint(1, 3)
        target = await self._start(app, lambda: known["listener"](count, 0.0))
        sender = await self._start(app, lambda: known["courier"](str(target.id), count))
        path, heard = await self._result(target)
        if heard != list(range(count)):
            raise Broken(f"{target.id} heard {heard} of {count} messages of a workflow")
        self.books.expect(target, path, None, count=2 * count)
        self.books.expect(sender, await self._result(sender), [f"pack{each}" for each in range(count)])

    async def _family(self, app: App, known: Any, number: int) -> None:
        size, pause = self.chance.randint(1, 4), self.chance.choice((0.0, 0.7, 1.0, 1.01))
        handle = await self._start(app, lambda: known["family"](size, pause))
        if pause >= 1.0 and (worker := await self._doer(handle, "before the children")) is not None:
            await asyncio.sleep(0.8)  # it leaves memory when it has waited for a second, and then a child ends
            self._storm.spoil(worker, ("settle",), "slow", Fate(held=0.3))
        self.books.expect(handle, await self._result(handle), None, count=size + 2)

    async def _crowd(self, app: App, known: Any, number: int) -> None:
        """Parents that all go on when their children have ended, and children that wait for the same slots."""
        await asyncio.gather(*(self._family(app, known, number) for _ in range(4)))

    async def _trip(self, app: App, known: Any, number: int) -> None:
        pause = self.chance.choice((0.3, 2.0, 5.0))
        handle = await self._start(app, lambda: known["trip"](pause))
        await asyncio.sleep(self.chance.choice((0.0, 0.01, 0.5, 2.0, 6.0)))
        for _ in range(self.chance.choice((1, 1, 2))):
            with suppress(WrongState):
                await self._verb(handle.cancel)
        try:
            path = await self._result(handle)
        except Exception as error:
            if type(error).__name__ != "WorkflowCancelled":
                raise
            if any(effect.workflow_id == handle.id for effect in self.books.world.effects):
                raise Broken(f"{handle.id} was cancelled behind its code's back") from error
            return
        cancelled = "=cancelled" in path
        self.books.expect(handle, path, None, count=len(path))
        undone = [each for each in self.books.world.effects if each.workflow_id == handle.id and each.name == "unbook"]
        booked = [each for each in path if each.startswith("book")]
        if cancelled and booked and not undone:
            raise Broken(f"{handle.id} was cancelled, and nothing was undone")
        if not cancelled and undone:
            raise Broken(f"{handle.id} came to its end, and was undone")

    async def _recalled(self, app: App, known: Any, number: int) -> None:
        handle = await self._start(app, lambda: known["recalled"](2.0))
        await self._doer(handle, "called")
        await asyncio.sleep(0.3)
        with suppress(WrongState):
            await self._verb(handle.cancel)
        worker = await self._doer(handle, "told")
        if worker is not None:  # when the step beside it has ended, behind the cancellation
            await asyncio.sleep(0.3)
            await self._storm.kill(worker)
        with suppress(WorkflowCancelled):  # before it was told
            path = await self._result(handle)
            self.books.expect(handle, path, None, count=len(path))

    async def _hurried(self, app: App, known: Any, number: int) -> None:
        handle = await self._start(app, lambda: known["hurried"](self.chance.choice((0.05, 0.6))))
        await asyncio.sleep(2.5)
        if self.books.is_calm and not self.books.was_asked_of_all(handle.id):
            raise Broken(f"{handle.id} has left memory, and has forgotten to ask its child to end")
        self.books.expect(handle, await self._result(handle), None, count=2)
        if not self.books.was_asked_of_all(handle.id):
            raise Broken(f"{handle.id} has ended, and its child wasn't asked to")

    async def _limited(self, app: App, known: Any, number: int) -> None:
        pause = self.chance.choice((0.05, 0.7, 3.0))
        handle = await self._start(app, lambda: known["limited"](pause))
        self.books.expect(handle, await self._result(handle), None, count=2)

    async def _lap(self, app: App, known: Any, number: int) -> None:
        laps = self.chance.randint(1, 3)
        handle = await self._start(app, lambda: known["lap"](0, laps))
        path = await self._result(handle)
        if [each.partition(":")[0] for each in path] != [f"lap{laps - 1}"]:
            raise Broken(f"{handle.id} ended with {path} after {laps} laps")

    async def _keyed(self, app: App, known: Any, number: int) -> None:
        key = f"shared{number}"
        apps = (app, self._app(PROCESS.get()))  # with lanes of their own
        handles = await asyncio.gather(
            *(
                self._start(apps[each % 2], lambda: known["chain"](2, []), key=key)
                for each in range(self.chance.randint(2, 4))
            )
        )
        if len({handle.id for handle in handles}) != 1:
            raise Broken(f"key {key!r} started {len({handle.id for handle in handles})} workflows")
        self.books.expect(handles[0], await self._result(handles[0]), ["step0", "step1"])

    async def _doomed(self, app: App, known: Any, number: int) -> None:
        names = [f"step{each}" for each in range(4)]
        match self.chance.choice(("busy", "waiting", "in doubt")):
            case "busy":
                handle = await self._start(app, lambda: known["chain"](4, [0.3, 0.01, 2.0]))
                await asyncio.sleep(self.chance.choice((0.0, 0.005, 0.05, 0.4, 2.0)))
            case "waiting":  # it notices nothing by itself
                handle = await self._start(app, lambda: known["torn"](20.0))
                await asyncio.sleep(self.chance.choice((0.0, 0.005, 0.05, 0.4, 2.0)))
            case _:  # while a flush of it is under way again
                handle = await self._start(app, lambda: known["steady"](4, 0.3))
                names = [f"steady{each}" for each in range(4)]
                worker = await self._doer(handle, "steady0")
                if worker is not None:
                    await self._storm.lose_flush(worker)
        with suppress(WrongState):
            await self._verb(handle.terminate)
        with suppress(WorkflowCancelled):
            self.books.expect(handle, await self._result(handle), names)

    async def _deadline(self, app: App, known: Any, number: int) -> None:
        limit = timedelta(seconds=self.chance.choice((0.1, 1.0, 3.0)))
        handle = await self._start(app, lambda: known["trip"](self.chance.choice((0.5, 2.0))), timeout=limit)
        with suppress(DeadlineExceeded):  # before it began
            path = await self._result(handle)
            self.books.expect(handle, path, None, count=len(path))

    async def _broken(self, app: App, known: Any, number: int) -> None:
        handle = await self._start(app, lambda: known["broken"]())
        try:
            await self._result(handle)
            raise Broken(f"{handle.id} didn't fail")
        except Flaky:
            pass
        self.books.world.mended.add(handle.id)
        await self._verb(handle.resume)
        self.books.expect(handle, await self._result(handle), ["before", "fragile", "after"])

    async def _tried(self, app: App, known: Any, number: int) -> None:
        attempts = self.chance.randint(1, 3)
        handle = await self._start(app, lambda: known["tried"](attempts))
        self.books.expect(handle, await self._result(handle), ["before", "capricious"])

    async def _writer(self, app: App, known: Any, number: int) -> None:
        count = self.chance.randint(1, 4)
        handle = await self._start(app, lambda: known["writer"](count))
        lines: dict[int, str] = {}
        while True:
            try:
                async for entry in handle.read_stream("lines", type=str):
                    if lines.setdefault(entry.offset, entry.value) != entry.value:
                        raise Broken(f"entry {entry.offset} of the stream of {handle.id} has changed")
                break
            except DatabaseUnavailable:
                continue
        path = await self._result(handle)
        self.books.expect(handle, path, [f"write{each}" for each in range(count)])
        if [lines[offset] for offset in sorted(lines)] != path:
            raise Broken(f"the stream of {handle.id} said {lines}, and it ended with {path}")

    async def _oracle(self, app: App, known: Any, number: int) -> None:
        answers = self.chance.randint(1, 3)
        handle = await self._start(app, lambda: known["oracle"](answers))
        curious = await self._start(app, lambda: known["curious"](str(handle.id)))
        for each in range(answers):
            answer = await handle.ask("questions", each, type=str)
            if answer.partition(":")[0] != f"answer{each}":
                raise Broken(f"{handle.id} answered {answer} to question {each}")
        self.books.expect(handle, await self._result(handle), None, count=2 * answers + 1)
        self.books.expect(curious, await self._result(curious), [f"={answers}", "knows"])

    async def _mixed(self, app: App, known: Any, number: int) -> None:
        seconds = self.chance.choice((0.4, 1.5))
        handle = await self._start(app, lambda: known["mixed"](seconds))
        self.books.expect(handle, await self._result(handle), None, count=3)

    async def _torn(self, app: App, known: Any, number: int) -> None:
        handle = await self._start(app, lambda: known["torn"](9.0))
        await asyncio.sleep(self.chance.choice((0.0, 1.0, 2.0)))
        if (worker := await self._doer(handle, "slow")) is not None:
            self._storm.deafen(worker, LEASE)
        sent = self.books.loop.time()
        await self._verb(lambda: handle.send("numbers", 1, idempotency_key="1"))
        self.books.expect(handle, await self._result(handle), None, count=3)
        heard = next(
            each.at for each in self.books.world.effects if each.workflow_id == handle.id and each.name == "heard"
        )
        if self.books.is_calm and heard - sent > LEASE:
            raise Broken(f"{handle.id} heard a message {heard - sent:.3f} s after it was sent")

    async def _payer(self, app: App, known: Any, number: int) -> None:
        count = self.chance.randint(1, 3)
        handle = await self._start(app, lambda: known["payer"](count))
        worker = await self._doer(handle, "counted")
        kind = self.chance.choice(("", "lost", "silent", "freeze", "late", "terminated"))
        if worker is not None:
            match kind:
                case "lost" | "silent":
                    self._storm.spoil(worker, ("commit",), kind, Fate(**{f"is_{kind}": True}))
                case "freeze":
                    await self._storm.strike_at(worker, "record_in_transaction", "freeze")
                case "late":
                    await self._storm.outlive(worker)
                case "terminated":
                    await self._storm.delay(worker, "begin", 0.5)
                    with suppress(WrongState):
                        await self._verb(handle.terminate)
                    with suppress(WorkflowCancelled):
                        await self._result(handle)
                    return
                case _:
                    pass
        path = await self._result(handle)
        self.books.expect(handle, path, ["counted", *(f"pay{each}" for each in range(count)), "paid"])

    async def resident(self, app: App) -> None:
        """What lives in a worker's own process: its starts may be claimed at birth, and are nobody else's to repeat."""
        passing = (DatabaseUnavailable, WorkflowNotFound) if self.books.loses_tail else (DatabaseUnavailable,)
        for _ in range(self.chance.randint(0, 4)):
            await asyncio.sleep(self.chance.choice((0.0, 0.05, 1.0, 3.0)))
            with suppress(*passing):
                handle = await app.start(app.workflow_functions["chain"](2, [self.chance.choice((0.0, 0.7))]))
                self.books.acknowledged.add(handle.id)
                self.books.expect(handle, await self._result(handle), ["step0", "step1"])
