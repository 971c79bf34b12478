"""The server of a simulation: a real PostgreSQL, behind a network that obeys chance.

Every statement is really executed. What is simulated is when: the request travels, the statement runs, its transaction
is held open for a while before it commits (so that others meet its locks and don't see it yet), the answer travels.
Anything of that may be cut short: the request is lost; the session is thrown out before the commit; the answer is lost;
the request hangs on the way until the client has given up, and takes effect then.

A transaction of several statements that idles for as long as a lease is ended, where whoever began it has set a limit;
where that wasn't done and it may hold locks, a note says so.

Only one statement runs at a time. One that waits for a lock is set aside until somebody's transaction has ended: the
server says itself that it waits. So the same seed meets the same locks.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

import psycopg
from psycopg import AsyncConnection, AsyncRawCursor, waiting
from psycopg.pq import ConnStatus, DiagnosticField, ExecStatus, PGconn, TransactionStatus
from psycopg.rows import namedtuple_row

from perdure.store import arrays, instants
from simulation.loop import PROCESS, Loop, Process
from simulation.seen import EPOCH_SECONDS, LEASE

_POLL_SECONDS = 0.002
_WAITING = """
    SELECT pid, pg_blocking_pids(pid) FROM pg_stat_activity
    WHERE wait_event_type = 'Lock' AND datname = current_database()
"""
_COMMANDS = {"_enter_gen": "begin", "_exit_gen": "commit"}
"""What psycopg sends by itself."""
_DEAD = PGconn.connect(b"host=/nowhere port=1")
_DEAD.finish()


@dataclass(slots=True)
class Fate:
    """What becomes of one request. Times in seconds of virtual time."""

    there: float = 0.0002
    """How long the request travels."""
    held: float = 0.0
    """How long the transaction stays open behind the statement."""
    back: float = 0.0002
    """How long the answer travels."""
    is_lost: bool = False
    """The request never arrives, and the connection is gone."""
    is_undone: bool = False
    """The session is thrown out before the commit."""
    is_silent: bool = False
    """The answer never arrives, and the connection is gone."""


Fates = Callable[[str, str], Fate]
"""Draws what becomes of a request: of a process, and the name of its statement."""


STATEMENT: ContextVar[str] = ContextVar("STATEMENT", default="")
"""The statement that is being sent."""


class Link:
    """One session of the real server."""

    def __init__(self, pgconn: PGconn, pid: int) -> None:
        self.pgconn = pgconn
        self.pid = pid
        self.prepared: Any = None
        self.clock = -1.0
        self._poll = select.poll()
        self._poll.register(pgconn.socket, select.POLLIN)

    def readable(self, seconds: float) -> bool:
        """Whether something has come from the server, in real time."""
        return bool(self._poll.poll(seconds * 1000))

    def execute(self, command: str) -> str:
        """Run a command, at once; returns the value that it gives, if any."""
        result = self.pgconn.exec_(command.encode())
        if result.status not in (ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK):
            state = result.error_field(DiagnosticField.SQLSTATE) or b"XX000"
            raise psycopg.errors.lookup(state.decode())(result.error_message.decode())
        return (result.get_value(0, 0) or b"").decode() if result.ntuples else ""


class Flight:
    """A statement that runs: driven until it is done, or waits for a lock."""

    def __init__(self, server: Server, connection: SimulatedConnection, gen: Generator[Any, Any, Any]) -> None:
        self._server = server
        self._connection = connection
        self.link = connection.link
        self._gen = gen
        self._state: Any = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.done: asyncio.Future[None] | None = None

    def advance(self) -> bool:
        """Whether it is done; else it waits for a lock. It was sent, whatever has become of the client's side since."""
        connection = self._connection
        client_side, connection.pgconn = connection.pgconn, self.link.pgconn
        try:
            return self._advance()
        finally:
            connection.pgconn = client_side

    def _advance(self) -> bool:
        try:
            if self._state is None:
                self._state = next(self._gen)
            while True:
                if self._state & waiting.WAIT_W:
                    self._state = self._gen.send(waiting.READY_W)
                elif self.link.readable(_POLL_SECONDS):
                    self._state = self._gen.send(waiting.READY_R)
                elif self._server.is_waiting(self.link):
                    return False
        except StopIteration as end:
            self.result = end.value
        except Exception as error:
            self.error = error
        return True


class Server:
    """The real server, and the sessions on it."""

    def __init__(self, url: str, loop: Loop, chance: Random, fates: Fates) -> None:
        self.url = url
        self.loop = loop
        self.process = Process("server")
        loop.add(self.process)
        self.is_up = True
        self.cut_off: set[Process] = set()
        self.fates = fates
        self.skew = 0.0
        """By how much its clock has been set, in seconds."""
        self.notes: list[tuple[str, str]] = []
        """What only the server knows: (what, statement)."""
        self._chance = chance
        self._blocked: list[Flight] = []
        self._connections: list[SimulatedConnection] = []
        self._listeners: list[tuple[Process, asyncio.Queue[Any]]] = []
        self.deaf: set[Process] = set()
        """Those that hear no hints."""

    # --- the real side ---------------------------------------------------------------------------------------------

    _free: ClassVar[list[Link]] = []
    _kept: ClassVar[list[Any]] = []
    """Real connections, which later seeds use again."""
    _monitor: ClassVar[psycopg.Connection[Any] | None] = None

    def is_waiting(self, link: Link) -> bool:
        """Whether that session waits for a lock, and would for ever. In a deadlock, one will be told soon.

        The lock table says it, not what the session shows: it may have got its lock, and not have woken yet.
        """
        if Server._monitor is None:
            Server._monitor = psycopg.connect(self.url, autocommit=True)
        waiting = dict(Server._monitor.execute(_WAITING).fetchall())
        reached = set[int]()
        ahead = [link.pid]
        while ahead:
            for pid in waiting.get(ahead.pop(), ()):
                if pid == link.pid:
                    return False
                if pid not in reached:
                    reached.add(pid)
                    ahead.append(pid)
        return bool(reached)

    def _link(self) -> Link:
        if Server._free:
            return Server._free.pop()
        connection = psycopg.connect(self.url, autocommit=True)
        for setting in (
            "deadlock_timeout = '2ms'",
            "synchronous_commit = off",
            "jit = off",
            "plan_cache_mode = force_generic_plan",
        ):
            connection.execute(f"SET {setting}")
        pgconn = connection.pgconn
        link = Link(pgconn, pgconn.backend_pid)
        Server._kept.append(connection)
        return link

    def _return(self, link: Link) -> None:
        """A session ends; another one may begin on it."""
        if link.pgconn.status != ConnStatus.OK:
            return
        if link.pgconn.transaction_status != TransactionStatus.IDLE:
            link.execute("ROLLBACK")
        Server._free.append(link)

    def prepare(self, link: Link, *, begins: bool) -> None:
        """Say what `perdure.now()` is in that session from now on, and begin a transaction."""
        commands: list[str] = []
        now = self.loop.time() + self.skew
        status = link.pgconn.transaction_status
        if link.clock != now and status != TransactionStatus.INERROR:
            commands.append(f"SET simulation.now = '{EPOCH_SECONDS + now:.6f}'")
            link.clock = now if status == TransactionStatus.IDLE else -1.0  # a rollback takes it back
        if begins:
            commands.append("BEGIN")
        if commands:
            link.execute("; ".join(commands))

    def settle(self) -> None:
        """A transaction has ended: who waited for its locks goes on."""
        moved = True
        while moved and self._blocked:
            moved = False
            for flight in list(self._blocked):
                if flight.advance():
                    self._blocked.remove(flight)
                    assert flight.done is not None
                    flight.done.set_result(None)
                    moved = True

    # --- the simulated side ----------------------------------------------------------------------------------------

    async def connect(self, url: str) -> Any:
        """What `Database` is given to make its connections."""
        fate = self.fates(PROCESS.get().whole.name, "connect")
        await asyncio.sleep(fate.there + fate.back)
        if not self.is_up or fate.is_lost or PROCESS.get().whole in self.cut_off:
            raise psycopg.OperationalError("connection refused")
        link = self._link()
        connection = SimulatedConnection(link.pgconn)
        connection.enter(self, link)
        self._connections.append(connection)
        return connection

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Any]:
        """A connection of code that isn't the engine's."""
        connection = await self.connect("")
        try:
            yield connection
        finally:
            await connection.close()

    def throw_out(self, connections: list[SimulatedConnection]) -> None:
        """End these sessions; their transactions are rolled back."""
        for connection in connections:
            connection.sever()
            connection.is_thrown_out = True
            if not connection.is_busy:
                self.hang_up(connection)
            elif connection.link.pgconn.transaction_status == TransactionStatus.INTRANS:  # between two statements
                connection.link.execute("ROLLBACK")
        self.settle()

    def in_each(self, command: str) -> None:
        """Run a command in each real session that does nothing in this moment."""
        for kept in Server._kept:
            if kept.pgconn.transaction_status == TransactionStatus.IDLE:
                kept.pgconn.exec_(command.encode())

    def of(self, process: Process) -> list[SimulatedConnection]:
        """The sessions of a process."""
        return [each for each in self._connections if each.process is process.whole]

    def crash(self) -> None:
        """Everybody is thrown out, and nobody comes in."""
        self.is_up = False
        self.throw_out(list(self._connections))

    def client_died(self, process: Process) -> None:
        """What its sessions run comes to its end, and commits where it commits by itself."""
        for connection in self.of(process):
            connection.sever()
            if not connection.is_busy:
                self.hang_up(connection)
        self.settle()

    def hang_up(self, connection: SimulatedConnection) -> None:
        """The session ends: what it hasn't committed is rolled back."""
        if connection in self._connections:
            self._connections.remove(connection)
            connection.link.prepared = connection._prepared
            self._return(connection.link)
            self.settle()

    async def serve(
        self,
        connection: SimulatedConnection,
        gen: Generator[Any, Any, Any],
        reply: asyncio.Future[Any],
        name: str,
        *,
        alone: bool,
    ) -> None:
        """One request, from its way there to its way back. Runs on, whatever becomes of the client."""
        fate = self.fates(connection.process.name, name)
        link = connection.link
        await asyncio.sleep(fate.there)
        if fate.is_lost or connection.is_thrown_out or not self.is_up or connection.process in self.cut_off:
            gen.close()
            return self._cut(connection)
        connection.requests += 1
        if connection.has_idled:
            gen.close()
            connection.sever()
            if not reply.done():
                reply.set_exception(psycopg.errors.IdleInTransactionSessionTimeout("it idled in a transaction"))
            return None
        alone = alone and (fate.held > 0 or fate.is_undone)
        self.prepare(link, begins=alone)
        flight = Flight(self, connection, gen)
        if not flight.advance():
            flight.done = self.loop.create_future()
            self._blocked.append(flight)
            self.notes.append(("blocked", name))
            await flight.done
        error = flight.error
        if alone and not connection.is_thrown_out:
            await asyncio.sleep(fate.held)
        if not connection.is_thrown_out:
            if fate.is_undone:
                connection.is_thrown_out = True
                if link.pgconn.transaction_status != TransactionStatus.IDLE:
                    link.execute("ROLLBACK")
            elif alone:
                try:
                    link.execute("ROLLBACK" if error is not None else "COMMIT")
                except psycopg.Error as failure:
                    error = failure
        elif link.pgconn.transaction_status != TransactionStatus.IDLE:
            link.execute("ROLLBACK")
        self._watch(connection)
        self.settle()
        if connection.is_severed and not connection.is_thrown_out and error is None:
            self.notes.append(("late", name))
        await asyncio.sleep(fate.back)
        if fate.is_silent or connection.is_thrown_out or connection.is_severed:
            return self._cut(connection)
        connection.is_busy = False
        if reply.done():
            return None
        if error is not None:
            reply.set_exception(error)
        else:
            reply.set_result(flight.result)
        return None

    def _watch(self, connection: SimulatedConnection) -> None:
        """A request is done: from now on the session idles, perhaps in a transaction."""
        link = connection.link
        if link.pgconn.transaction_status == TransactionStatus.IDLE:
            connection.may_idle = True
            return
        if connection.may_idle and link.pgconn.transaction_status == TransactionStatus.INTRANS:
            connection.may_idle = link.execute("SHOW idle_in_transaction_session_timeout") == "0"
            if not connection.may_idle:  # the real server's time is another one
                link.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
        self.loop.call_later(LEASE, self._has_idled, connection, connection.requests)

    def _has_idled(self, connection: SimulatedConnection, requests: int) -> None:
        """A lease later."""
        if connection.requests != requests or connection not in self._connections or connection.is_thrown_out:
            return
        if not connection.may_idle:
            self.notes.append(("idled", ""))
            connection.has_idled = True
            self.hang_up(connection)
        elif connection.link.execute("SELECT pg_catalog.pg_current_xact_id_if_assigned()"):
            self.notes.append(("held open", ""))

    def _cut(self, connection: SimulatedConnection) -> None:
        connection.sever()
        connection.is_busy = False
        self.hang_up(connection)

    def close(self) -> None:
        """The seed is over: its sessions end."""
        for connection in self._connections:
            link = connection.link
            if connection.is_busy and link.pgconn.transaction_status == TransactionStatus.ACTIVE:
                link.pgconn.finish()  # it waits for a lock, or nobody has read its answer
            else:
                link.prepared = connection._prepared
                self._return(link)
        self._connections.clear()

    # --- hints -----------------------------------------------------------------------------------------------------

    def notified(self, payloads: list[str]) -> None:
        """Somebody has sent hints: who listens hears them, or doesn't."""
        for process, queue in self._listeners:
            delay = self._chance.choice((0.0002, 0.001, 0.005))
            if self._chance.random() < 0.2 or process in self.deaf:
                self.notes.append(("unheard", ""))
            else:
                for payload in payloads:
                    self.loop.call_later(delay, queue.put_nowait, payload, context=self.process.context())


class SimulatedConnection(AsyncConnection[Any]):
    """A connection as the engine has it; its requests go to the server of the simulation."""

    def enter(self, server: Server, link: Link) -> None:
        """It is open."""
        self.server = server
        self.link = link
        self.process = PROCESS.get().whole
        self.is_busy = self.is_severed = self.is_thrown_out = self.has_idled = False
        self.may_idle = True
        self.requests = 0
        self._severed: asyncio.Future[None] = server.loop.create_future()
        self._autocommit = True
        self.row_factory = namedtuple_row
        self.cursor_factory = AsyncRawCursor
        if link.prepared is not None:
            self._prepared = link.prepared
        arrays.register(self.adapters)
        instants.register(self.adapters)

    def sever(self) -> None:
        """The client's side is gone; what the server does is its own affair."""
        if not self.is_severed:
            self.is_severed = True
            self.pgconn = _DEAD
            if not self._severed.done():
                self._severed.set_result(None)

    async def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        if self.is_severed:
            gen.close()
            raise psycopg.OperationalError("the connection is closed")
        self.is_busy = True
        reply: asyncio.Future[Any] = self.server.loop.create_future()
        is_idle = self.pgconn.transaction_status == TransactionStatus.IDLE
        alone = is_idle and gen.__name__ == "_execute_gen"
        name = _COMMANDS.get(gen.__name__, STATEMENT.get())
        self.server.loop.spawn(self.server.process, self.server.serve(self, gen, reply, name, alone=alone))
        try:
            await asyncio.wait({reply, self._severed}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self.sever()
            raise
        if not reply.done():
            raise psycopg.OperationalError("server closed the connection unexpectedly")
        return reply.result()

    async def notifies(self, **options: Any) -> Any:
        queue = asyncio.Queue[Any]()
        listener = (self.process, queue)
        self.server._listeners.append(listener)
        try:
            while not self.is_severed:
                getter = asyncio.ensure_future(queue.get())
                await asyncio.wait({getter, self._severed}, return_when=asyncio.FIRST_COMPLETED)
                if not getter.done():
                    getter.cancel()
                    break
                yield psycopg.Notify("simulation", getter.result(), 0)
        finally:
            self.server._listeners.remove(listener)
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    async def close(self) -> None:
        if not self.is_severed:
            self.sever()
            if not self.is_busy:
                self.server.hang_up(self)


def severed(connection: Any) -> None:
    """What stands for `perdure.store.database._sever`."""
    with suppress(Exception):
        connection.sever()
