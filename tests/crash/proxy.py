"""A TCP proxy in front of PostgreSQL that does damage at a chosen moment.

It reads the messages of the protocol (https://www.postgresql.org/docs/current/protocol-message-formats.html), so that
it knows which statement a request runs, also where that was prepared earlier under a name, and where the answer ends:

    with Proxy(port) as proxy:
        fault = proxy.plan("loses the acknowledgement of", lambda sql: sql == text, at=2)
        ...
        await fault.has_happened()

A request is everything up to Sync (or one simple Query); it runs a statement if it has an Execute (or is a Query).
The proxy lives in a thread with an event loop of its own: it works on while the loop of the test is blocked.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, Self

Damage = Literal[
    "loses",  # the request never reaches the server; the connection ends
    "resets",  # the same, by RST
    "loses the acknowledgement of",  # the server has answered; the answer is lost, the connection ends
    "swallows",  # the request never reaches the server, and the connection stays open, silent
    "swallows the answer to",  # the server has answered; the connection stays open, silent
    "delays",  # the request reaches the server when the test lets it
    "delays the answer to",  # the answer reaches the client when the test lets it
]
Fits = Callable[[str], bool]

_LINGER_NOT = struct.pack("ii", 1, 0)


class Fault:
    """Damage that is planned: for the requests number `at` to `at + times - 1` of those that fit."""

    def __init__(self, damage: Damage, fits: Fits, at: int, times: int) -> None:
        self.damage = damage
        self.fits = fits
        self.at = at
        self.times = times
        self.met = 0
        self.done = 0
        self._done = threading.Event()
        self._go_on = threading.Event()

    def takes(self, sql: str) -> bool:
        """Whether this request is the one (or one of those)."""
        if not self.fits(sql):
            return False
        self.met += 1
        return self.at <= self.met < self.at + self.times

    def happen(self) -> None:
        self.done += 1
        if self.done >= self.times:
            self._done.set()

    async def has_happened(self, timeout: float = 30) -> None:
        """Wait until it is done (where it delays: until it holds the request or the answer)."""
        assert await asyncio.to_thread(self._done.wait, timeout), f"no request came that it {self.damage}"

    def let_go(self) -> None:
        """End a delay."""
        self._go_on.set()

    async def wait_for_leave(self) -> None:
        while not self._go_on.is_set():
            await asyncio.sleep(0.005)


class _Link:
    """One client's connection, and the one to the server that belongs to it."""

    def __init__(
        self,
        proxy: Proxy,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self.proxy = proxy
        self.client_reader, self.client_writer = client
        self.server_reader, self.server_writer = server
        self.statements: dict[bytes, str] = {}
        self.fault: Fault | None = None  # what is to be done with the answer under way
        self.silent = False

    async def run(self) -> None:
        up, down = asyncio.ensure_future(self._requests()), asyncio.ensure_future(self._answers())
        try:
            await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (up, down):
                task.cancel()
            await asyncio.gather(up, down, return_exceptions=True)

    def close(self, *, reset: bool = False) -> None:
        if reset:
            raw = self.client_writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
            self.client_writer.transport.abort()
        for writer in (self.client_writer, self.server_writer):
            with suppress(OSError, RuntimeError):
                writer.close()

    async def _requests(self) -> None:
        (length,) = struct.unpack("!i", head := await self.client_reader.readexactly(4))
        self.server_writer.write(head + await self.client_reader.readexactly(length - 4))
        request, sql, runs = b"", "", False
        while True:
            kind, body, message = await _message(self.client_reader)
            request += message
            if kind == b"P":
                name, text, _ = body.split(b"\0", 2)
                self.statements[name] = sql = text.decode()
            elif kind == b"B":
                sql = self.statements.get(body.split(b"\0", 2)[1], "")
            elif kind == b"Q":
                sql = body.rstrip(b"\0").decode()
            runs = runs or kind in (b"E", b"Q")
            if kind in (b"S", b"Q", b"X"):
                if not await self._forward(request, sql if runs else None):
                    return
                request, sql, runs = b"", "", False

    async def _forward(self, request: bytes, sql: str | None) -> bool:
        """Pass a request on, or do what is planned; false: the connection has ended."""
        fault = self.proxy.fault_for(sql) if sql is not None else None
        if self.proxy.latency:
            await asyncio.sleep(self.proxy.latency)
        if self.server_writer.is_closing():
            return False
        if self.proxy.is_silent or self.silent:
            return True
        if fault is None:
            self.server_writer.write(request)
            return True
        if fault.damage in ("loses", "resets"):
            self.close(reset=fault.damage == "resets")
            fault.happen()
            return False
        if fault.damage == "swallows":
            self.silent = True
            fault.happen()
            return True
        if fault.damage == "delays":
            fault.happen()
            await fault.wait_for_leave()
        else:
            self.fault = fault
        self.server_writer.write(request)
        return True

    async def _answers(self) -> None:
        answer = b""
        while True:
            kind, _, message = await _message(self.server_reader)
            if self.proxy.is_silent or self.silent:
                continue
            if self.client_writer.is_closing():
                return
            if self.fault is None:
                self.client_writer.write(message)
                continue
            answer += message
            if kind == b"Z":
                fault, self.fault = self.fault, None
                fault.happen()
                if fault.damage == "loses the acknowledgement of":
                    self.close()
                    return
                if fault.damage == "swallows the answer to":
                    self.silent = True
                    continue
                await fault.wait_for_leave()
                self.client_writer.write(answer)
                answer = b""


class Proxy:
    """Listens on a port of 127.0.0.1, and passes everything on to another one."""

    def __init__(self, port: int) -> None:
        self.is_silent = False
        """Everything is swallowed from now on, on all connections, also the handshakes of new ones."""
        self.accepted = 0
        """How many connections there were."""
        self.latency = 0.0
        """For how many seconds each request is held back."""
        self._to = port
        self._faults: list[Fault] = []
        self._links: set[_Link] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Self:
        self._thread.start()
        self._listener.setblocking(False)
        self._loop.call_soon_threadsafe(self._loop.add_reader, self._listener, self._accept)
        return self

    def __exit__(self, *exc: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def url(self, database: str = "perdure", user: str = "perdure") -> str:
        """How to connect through it: in plain text, so that it can read along."""
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}?sslmode=disable&gssencmode=disable"

    def plan(self, damage: Damage, fits: Fits, *, at: int = 1, times: int = 1) -> Fault:
        """Do that to a request whose SQL fits: to the `at`-th from now on, and to `times` in a row."""
        fault = Fault(damage, fits, at, times)
        self._faults.append(fault)
        return fault

    def cut(self) -> None:
        """End all connections."""
        self._loop.call_soon_threadsafe(lambda: [link.close() for link in list(self._links)])

    def speak(self) -> None:
        """End the silence: what was silent is cut, new connections work."""
        self.is_silent = False
        self.cut()

    def fault_for(self, sql: str) -> Fault | None:
        taken = [fault for fault in self._faults if fault.takes(sql)]
        return taken[0] if taken else None

    def _accept(self) -> None:
        """Take what comes in. The sockets are ours from their first moment: asyncio forgets some when it is stopped."""
        with suppress(OSError):
            accepted, _ = self._listener.accept()
            self.accepted += 1
            self._begin(self._own(accepted))

    def _begin(self, accepted: socket.socket) -> None:
        task = self._loop.create_task(self._serve(accepted))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    def _own(self, raw: socket.socket) -> socket.socket:
        raw.setblocking(False)
        self._sockets.append(raw)
        return raw

    async def _streams(self, raw: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(sock=raw)
        self._writers.add(writer)
        return reader, writer

    async def _serve(self, accepted: socket.socket) -> None:
        reader, writer = await self._streams(accepted)
        if self.is_silent:
            with suppress(OSError):
                while await reader.read(65536):
                    pass
            writer.close()
            return
        upward = self._own(socket.socket())
        try:
            await self._loop.sock_connect(upward, ("127.0.0.1", self._to))
        except OSError:
            writer.close()
            return
        link = _Link(self, (reader, writer), await self._streams(upward))
        self._links.add(link)
        try:
            with suppress(asyncio.IncompleteReadError, OSError):
                await link.run()
        finally:
            self._links.discard(link)
            link.close()

    async def _close(self) -> None:
        for fault in self._faults:
            fault.let_go()
        self._loop.remove_reader(self._listener)
        while left := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            await _turns()
        for writer in self._writers:
            writer.transport.abort()
        await _turns()  # that is when their sockets are closed
        for raw in self._sockets:
            raw.close()


async def _turns() -> None:
    """Let happen what waits only for its turn: asyncio takes several to end a connection."""
    for _ in range(10):
        await asyncio.sleep(0)


async def _message(reader: asyncio.StreamReader) -> tuple[bytes, bytes, bytes]:
    """One message: its kind, its body, and all of it."""
    head = await reader.readexactly(5)
    (length,) = struct.unpack("!i", head[1:])
    body = await reader.readexactly(length - 4)
    return head[:1], body, head + body
