"""The faults of a seed: what becomes of each request, and what strikes the processes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random

from simulation.books import Books
from simulation.loop import Loop, Process
from simulation.points import FLUSHES
from simulation.seen import LEASE, Seen
from simulation.server import Fate, Server
from simulation.workers import Workers

STORM_SECONDS = 7.0
KINDS = ("kill", "freeze", "terminate", "throw out", "restart", "partition")
AMBUSHES: tuple[tuple[str, ...], ...] = (
    FLUSHES, FLUSHES, FLUSHES, ("claim", "claim_further"), ("load",), ("heartbeat",), ("wake_due",),
    ("recover", "bury"), ("release",),
)  # fmt: skip
FAVOURITES = (
    *FLUSHES, "claim", "load", "heartbeat", "send", "start", "start_keyed", "results", "register_worker", "cancel",
    "commit", "", "", "",
)  # fmt: skip


@dataclass
class Ambush:
    """A fault that waits until a process sends one of these statements."""

    kind: str
    statements: Sequence[str]
    fate: Fate
    sprung: asyncio.Event = field(default_factory=asyncio.Event)


class Storm:
    """Draws faults. Each seed has some kinds of them, so that one doesn't hide the other."""

    def __init__(self, number: int, loop: Loop, books: Books, seen: Seen) -> None:
        self._loop = loop
        self._books = books
        self._seen = seen
        self._is_raging = True
        self._ambushes: dict[str, Ambush] = {}
        self._unheard: dict[str, float] = {}
        """Processes whose beats are lost, and until when."""
        self._network = Random(f"network {number}")
        chance = self._chance = Random(f"storm {number}")
        self.is_calm = books.is_calm = number % 8 == 0
        """Nothing goes wrong, but for hints: they may get lost at any time."""
        self.loses_tail = books.loses_tail = number % 8 == 5
        """An asynchronous standby takes over, and the last transactions are gone, acknowledged or not."""
        self.sets_clock = books.sets_clock = number % 8 == 3
        """The server's clock is set forward and back: then leases end early, or seem to last."""
        self._holds = chance.choice((0.0, 0.3, 0.8))
        self._cuts = 0.0 if self.is_calm else chance.choice((0.0, 0.01, 0.03))
        self._hangs = 0.0 if self.is_calm else chance.choice((0.0, 0.0, 0.005, 0.02))
        self._often_cut = chance.choice(FAVOURITES) if self._cuts else ""
        self._often_hangs = chance.choice(FAVOURITES) if self._hangs else ""
        self._kinds = [] if self.is_calm else chance.sample(KINDS, k=chance.randint(0, 4))
        if self.sets_clock:
            self._kinds.append("clock")

    def aim(self, workers: Workers, server: Server) -> None:
        """At these."""
        self._workers, self._server = workers, server

    # --- what becomes of a request ---------------------------------------------------------------------------------

    def fate(self, process: str, statement: str) -> Fate:
        """What becomes of this one."""
        chance = self._network
        ambush = self._ambushes.get(process)
        if ambush is not None and statement in ambush.statements:
            del self._ambushes[process]
            self._seen.faults[f"{ambush.kind} at {statement}"] += 1
            ambush.sprung.set()
            return ambush.fate
        fate = Fate(there=chance.choice((0.0001, 0.0003, 0.002)), back=chance.choice((0.0001, 0.0003, 0.002)))
        if chance.random() < self._holds:
            fate.held = chance.choice((0.0005, 0.002, 0.01))
        if not self._is_raging:
            return fate
        if statement == "heartbeat" and self._loop.time() < self._unheard.get(process, 0.0):
            fate.is_lost = True
            return fate
        if chance.random() < (0.3 if statement == self._often_cut != "" else self._cuts):
            kind = chance.choice(("is_lost", "is_undone", "is_silent"))
            setattr(fate, kind, True)
            self._books.trouble(process, 0.5)
            self._seen.faults[kind] += 1
        if chance.random() < (0.2 if statement == self._often_hangs != "" else self._hangs):
            side = chance.choice(("there", "held", "back"))
            setattr(fate, side, chance.choice((LEASE / 2, LEASE * 1.5, LEASE * 3)))
            self._books.trouble(process, getattr(fate, side))
            self._seen.faults[f"hangs {side}"] += 1
        return fate

    # --- what strikes ----------------------------------------------------------------------------------------------

    async def rage(self) -> None:
        """Strike, until it is over."""
        chance = self._chance
        while self._kinds and self._loop.time() < STORM_SECONDS:
            await asyncio.sleep(chance.uniform(0.2, 4.0))
            kind, name = chance.choice(self._kinds), chance.choice(self._workers.names or [""])
            if not name:
                continue
            if kind in ("restart", "clock") or chance.random() < 0.4 or await self._waits(kind, name):
                await self._strike(kind, name)
        await asyncio.sleep(max(0.0, STORM_SECONDS - self._loop.time()))
        self._is_raging = False

    async def _waits(self, kind: str, name: str) -> bool:
        """Wait until something is under way. False: it came to nothing."""
        chance = self._chance
        fate = Fate(back=0.002)
        match chance.choice(("as usual", "lost", "silent", "there", "held", "held")):
            case "lost":
                fate.is_lost = True
            case "silent":
                fate.is_silent = True
            case "there":
                fate.there = LEASE * 2
            case "held":
                fate.held = chance.choice((0.01, LEASE * 2))
            case _:
                pass
        ambush = self._ambushes[name] = Ambush(kind, chance.choice(AMBUSHES), fate)
        with suppress(TimeoutError):
            async with asyncio.timeout(3.0):
                await ambush.sprung.wait()
        if self._ambushes.get(name) is ambush:
            del self._ambushes[name]
            return False
        await asyncio.sleep(chance.choice((0.0, 0.0003, 0.001)))
        return True

    async def lose_flush(self, name: str) -> bool:
        """The next flush of that worker never arrives, and it hears nothing from then on. Not every seed has faults."""
        ambush = self.spoil(name, FLUSHES, "lost", Fate(is_lost=True)) if name in self._workers.names else None
        if ambush is not None:
            self._server.deaf.add(self._workers[name])
        return await self._springs(name, ambush)

    def spoil(self, name: str, statements: Sequence[str], kind: str, fate: Fate) -> Ambush | None:
        """That becomes of the next of these statements of this process. Not every seed has faults."""
        if self.is_calm or not self._is_raging or name in self._ambushes:
            return None
        self._books.trouble(name, 3.0)
        ambush = self._ambushes[name] = Ambush(kind, statements, fate)
        return ambush

    async def strike_at(self, name: str, statement: str, kind: str) -> None:
        """That strikes the worker when it sends such a statement."""
        if await self._springs(name, self.spoil(name, (statement,), kind, Fate(back=0.002))):
            await self._strike(kind, name)

    async def delay(self, name: str, statement: str, seconds: float) -> bool:
        """The next answer to that statement of this process comes late. Returns, at its beginning, whether it does."""
        return await self._springs(name, self.spoil(name, (statement,), "late", Fate(back=seconds)))

    async def outlive(self, name: str) -> None:
        """The next transaction of that worker commits when its lease has run out."""
        if await self.delay(name, "begin", LEASE / 2):
            self._unheard[name] = self._loop.time() + LEASE * 2
            self.spoil(name, ("commit",), "late", Fate(there=LEASE * 0.95))

    async def _springs(self, name: str, ambush: Ambush | None) -> bool:
        if ambush is None:
            return False
        with suppress(TimeoutError):
            async with asyncio.timeout(2.0):
                await ambush.sprung.wait()
                return True
        if self._ambushes.get(name) is ambush:
            del self._ambushes[name]
        return False

    def deafen(self, name: str, seconds: float) -> None:
        """That worker hears no hints for so long."""
        if name in self._workers.names:
            process = self._workers[name]
            self._server.deaf.add(process)
            self._loop.call_later(seconds, self._server.deaf.discard, process)

    async def kill(self, name: str) -> None:
        """That worker dies now, where a seed has faults."""
        if not self.is_calm and self._is_raging:
            await self._strike("kill", name)

    async def _strike(self, kind: str, name: str) -> None:
        workers, server = self._workers, self._server
        if name not in workers.names:
            return
        chance, trouble = self._chance, self._books.trouble
        self._seen.faults[kind] += 1
        trouble(name, LEASE)
        process = workers[name]
        match kind:
            case "kill":
                trouble(name, float("inf"))
                workers.kill(name)
                workers.begin()
            case "terminate":
                trouble(name, float("inf"))
                workers.terminate(name)
                workers.begin()
            case "freeze":
                seconds = chance.choice((0.3, LEASE * 0.9, LEASE * 1.2, LEASE * 2.5))
                trouble(name, seconds + 0.5)
                self._books.frozen.append((name, self._loop.time(), self._loop.time() + seconds))
                process.is_frozen = True
                await asyncio.sleep(seconds)
                process.is_frozen = False
            case "partition":
                seconds = chance.choice((0.3, LEASE * 1.2, LEASE * 2.5))
                trouble(name, seconds)
                server.cut_off.add(process)
                await asyncio.sleep(seconds)
                server.cut_off.discard(process)
            case "throw out":
                connections = server.of(process)
                if connections:
                    server.throw_out(chance.sample(connections, k=chance.randint(1, len(connections))))
            case "restart":
                server.crash()
                await asyncio.sleep(chance.choice((0.1, LEASE * 0.8, LEASE * 1.5)))
                server.is_up = True
            case _:
                server.skew += chance.choice((LEASE * 2, 0.5, -0.5, -LEASE * 2, -server.skew))

    async def lose_tail(self, client: Process) -> None:
        """A standby takes over that hasn't got all. What clients knew of it is void, so theirs end."""
        chance = self._chance
        await asyncio.sleep(chance.uniform(0.0, 4.0))
        self._books.copy()
        await asyncio.sleep(chance.choice((0.01, 0.1, 1.0)))
        self._seen.faults["lost tails"] += 1
        self._loop.kill(client)
        self._server.crash()
        self._books.promote()
        await asyncio.sleep(chance.choice((0.1, LEASE * 1.5)))
        self._server.is_up = True
