"""The one life cycle of everything periodic: tick, wait, tick; what fails is told once and tried again."""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import psycopg

from perdure import telemetry
from perdure.errors import ConfigurationError, DatabaseUnavailable
from perdure.store.database import Interrupted
from perdure.store.pauses import backoff

_PATIENT_SECONDS = 1.0


class Turns:
    """What looks now and then takes turns, so that a worker at rest needs one connection for all of it.

    A turn that takes long (a statement without an answer) holds up nobody: after a second the next goes beside it.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self.pace = 1
        """How many times as long to pause between looks that others take as well: 2 where many workers live."""

    @property
    def is_taken(self) -> bool:
        """Whether somebody looks at this moment."""
        return self._lock.locked()

    @asynccontextmanager
    async def turn(self) -> AsyncGenerator[None]:
        """One's own turn, in the block."""
        mine = False
        try:
            async with asyncio.timeout(_PATIENT_SECONDS):
                mine = await self._lock.acquire()
        except TimeoutError:
            pass
        try:
            yield
        finally:
            if mine:
                self._lock.release()


class Loop(ABC):
    """Calls `tick` every `interval` seconds, or earlier after `wake()`; subclasses write `tick`.

    `tick` returns in how many seconds it wants to be called again, or None for the interval. Where many workers live,
    one that `is_shared`, in which any worker finds what is there, may wait longer. While the database is away it is
    called again with growing pauses; that is told when it begins and when it ends.
    """

    name = "loop"

    def __init__(self, interval: float, *, turns: Turns, jitter: float = 0.1, is_shared: bool = False) -> None:
        self.interval = interval
        self.turns = turns
        self._jitter = jitter
        self._is_shared = is_shared
        self._woken = asyncio.Event()

    @abstractmethod
    async def tick(self) -> float | None:
        """Do the work once."""

    def wake(self) -> None:
        """Tick soon."""
        self._woken.set()

    @property
    def pause(self) -> float:
        """The seconds between two ticks, when nothing else is wanted."""
        return self.interval * (self.turns.pace if self._is_shared else 1)

    async def run(self) -> None:
        """Tick until cancelled."""
        while True:
            wanted = await self._tick()
            pause = self.pause * random.uniform(1 - self._jitter, 1 + self._jitter) if wanted is None else wanted
            if pause > 0:
                await self._wait(pause)
            self._woken.clear()

    async def _tick(self) -> float | None:
        away = False
        for pause in backoff():
            try:
                wanted = await self.tick()
            except (Interrupted, DatabaseUnavailable, ConfigurationError, psycopg.Error) as error:
                if not away:
                    telemetry.emit(telemetry.DatabaseLost(component=self.name, reason=str(error)))
                away = True
                await asyncio.sleep(pause)
            else:
                if away:
                    telemetry.emit(telemetry.DatabaseBack(component=self.name))
                return wanted
        raise AssertionError("backoff never ends")

    async def _wait(self, seconds: float) -> None:
        timer = asyncio.get_running_loop().call_later(seconds, self._woken.set)
        try:
            await self._woken.wait()
        finally:
            timer.cancel()
