"""Hints from other processes: LISTEN on a connection of its own, NOTIFY through the pool.

Polling is the truth; a hint only makes somebody look earlier. So nothing here is ever waited for, and whatever fails is
tried again later. A transaction pooler accepts LISTEN and then hears nothing: only a test tells, so the listener sends
itself a word through the pool, and `hears` is true once it came back. Whoever polls does so rarely while it hears.

A hint is one line: `queue NAME` (something is pending there), `waiting` (somebody waits for results in another
process), `result ID` (that workflow has ended), `echo TOKEN` (the test). Whoever sends one has acted on it already, and
marks it (`queue@MARK NAME`), so that it needn't act again when it comes back. Hints are coalesced: at most one NOTIFY
every few milliseconds and process, whatever happens in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from uuid import uuid4

import psycopg

from perdure import telemetry
from perdure.errors import ConfigurationError
from perdure.store.arrays import Texts
from perdure.store.database import Connection, Database, Interrupted
from perdure.store.pauses import backoff

_PAUSE = 0.004
_MOST = 400
_ECHO_SECONDS = 2.0
_RETEST_SECONDS = 30.0


def channel(schema: str) -> str:
    """The channel of a schema: a name has at most 63 bytes."""
    return f"perdure:{schema}".encode()[:63].decode(errors="ignore")


class Notifier:
    """Sends hints, coalesced. `notify` never waits and never fails."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._channel = channel(database.settings.schema)
        self._hints: dict[str, None] = {}
        self._mark = f"@{uuid4().hex[:12]}"
        self._sending: asyncio.Task[None] | None = None

    def notify(self, hint: str) -> None:
        """Send a hint soon; a hint that is waiting to be sent already is not sent twice."""
        if len(self._hints) < _MOST:
            self._hints[hint] = None
        if self._sending is None:
            self._sending = asyncio.ensure_future(self._send())

    def is_own(self, hint: str) -> bool:
        """Whether it was sent from here."""
        return hint.partition(" ")[0].endswith(self._mark)

    async def close(self) -> None:
        """Send what is waiting, briefly."""
        if sending := self._sending:
            await asyncio.wait({sending}, timeout=1)
            sending.cancel()

    def _marked(self, hint: str) -> str:
        kind, space, rest = hint.partition(" ")
        return f"{kind}{self._mark}{space}{rest}"

    async def _send(self) -> None:
        try:
            while self._hints:
                hints, self._hints = self._hints, {}
                with suppress(Interrupted, ConfigurationError, psycopg.Error):
                    await self._database.attempt("notify", self._channel, Texts(map(self._marked, hints)))
                await asyncio.sleep(_PAUSE)
        finally:
            self._sending = None


class Listener:
    """Hears hints. `run` it as a task; `hears` says whether hints arrive at all."""

    def __init__(self, database: Database, on_hint: Callable[[str], None]) -> None:
        self._database = database
        self._on_hint = on_hint
        self._echo = ""
        self._echoed = False
        self.hears = False

    async def run(self) -> None:
        """Listen until cancelled; reconnect when the connection goes."""
        pauses = backoff(0.2, 5.0)
        while True:
            try:
                connection = await self._database.open()
                try:
                    await self._listen(connection)
                    pauses = backoff(0.2, 5.0)
                finally:
                    self.hears = False
                    with suppress(psycopg.Error, OSError):
                        await connection.close()
            except (Interrupted, ConfigurationError, psycopg.Error, OSError) as error:
                telemetry.emit(telemetry.ListenerLost(reason=str(error)))
            await asyncio.sleep(next(pauses))

    async def _listen(self, connection: Connection) -> None:
        name = channel(self._database.settings.schema).replace('"', '""')
        await connection.execute(f'LISTEN "{name}"'.encode(), prepare=False)
        test = asyncio.ensure_future(self._test())
        try:
            async for notification in connection.notifies():
                if notification.payload == self._echo:
                    self.hears = self._echoed = True
                else:
                    self._on_hint(notification.payload)
        finally:
            test.cancel()

    async def _test(self) -> None:
        """Send a word to ourselves, again and again: whether the last one came back is what `hears` says."""
        while True:
            self._echo, self._echoed = f"echo {uuid4()}", False
            with suppress(Interrupted, ConfigurationError, psycopg.Error):
                await self._database.attempt("notify", channel(self._database.settings.schema), Texts([self._echo]))
            await asyncio.sleep(_ECHO_SECONDS)
            self.hears = self._echoed
            await asyncio.sleep(_RETEST_SECONDS)
