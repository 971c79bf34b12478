"""A PostgreSQL that the processes of a project share: the first starts it, the last one to leave stops it.

The folder of a cluster holds three locks (flocks: the kernel drops them when their holder dies, see `locks`):

    control.lock   held exclusively by whoever starts, joins, leaves or stops. One at a time; a second or so at most.
    users.lock     held shared by every process that uses the server, for as long as it uses it.
    server.lock    held by every process of the server itself, for as long as it lives (see `server`).

and a file `keep`: the server was started by `perdure postgres start` and stays when its last user leaves.

    join    under control: lock users (shared); unless server.lock is held, start the server, which takes it along;
            wait until it answers; make the database if it is missing.
    leave   under control: give up users; if nobody else holds it and there is no `keep`, stop the server and wait.
    start   under control: write `keep`, then as join, without becoming a user.
    stop    under control: remove `keep`, stop the server, whoever uses it.

Invariants:

1. At most one server runs: only a holder of control starts one, and only while it holds server.lock itself.
2. A server isn't stopped under a user, except by `stop`: a joiner locks users before it looks for the server, and a
   leaver finds out that it is the last one and stops the server without letting go of control in between. So a joiner
   comes before the leaver's question (which then has a "no" for an answer) or after the server is gone.
3. All that is remembered is in the kernel or in PostgreSQL's own files: there is no list of users to fall out of date.

Who dies here, and what becomes of it:

- A user, by SIGKILL or what else skips `atexit`: its share of users.lock is gone. If it was the last one, the server
  runs on, and the next process joins it and stops it when it leaves, or `perdure postgres stop` does. No watchdog: a
  server without clients costs some memory, and one more process that can go wrong would cost more.
- A starter, while the data is made: what it made has another name until it is whole; the next one begins anew.
- A starter, once the server is launched: the server holds its own lock and goes on; the next one waits for it.
- A leaver, between its question and the signal: as a user that was killed. After the signal: the server shuts down by
  itself, and a joiner who finds it doing so waits, and starts it again.
- The postmaster, by SIGKILL: its children hold server.lock until they have noticed; then a joiner starts the server
  again, and PostgreSQL recovers. Who merely uses it isn't told: connections break, and the next `acquire` of any
  process brings it back.
- The machine: as above, and stale files of the last life are removed by whoever starts, which only happens when
  server.lock says that nothing of it lives.

Forks: a forked child (os.fork, multiprocessing) shares its parent's open users.lock, so it counts as a user for as
long as it lives, whether it asked to or not: it may hold the parent's URL. It leaves at exit if it runs `atexit`
(os.fork and sys.exit do, multiprocessing doesn't: a child of that kind which outlives its parent leaves the server to
the next process). A child between fork and exec holds a copy for some microseconds; a leaver that asks just then takes
it for a user, and the server runs on, as above. Threads: all calls are safe; the state is the process's, behind a lock
that a forked child gets anew.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import psycopg

from perdure.embedded import locks, places
from perdure.embedded.account import account_for
from perdure.embedded.server import ROLE, Server, StopMode
from perdure.errors import ConfigurationError

DATABASE = "perdure"

# Longer than any start takes, but for the recovery of a large database after a crash.
_START_LIMIT = 300.0
_CONTROL_LIMIT = 330.0
_PAUSE = 0.01

_OWN_NAME = "perdure postgres"  # what sessions of the cluster itself are called in pg_stat_activity


_in_use: set[Cluster] = set()  # keeps them alive until the process leaves
_clusters: weakref.WeakSet[Cluster] = weakref.WeakSet()


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How a cluster is.

    Attributes:
        running: The server takes connections.
        kept: It stays when its last user leaves.
        directory: The cluster's folder.
        url: How to connect to it; None when it has never run.
        version: The version of PostgreSQL, when it is running.
        pid: The process id of the postmaster, when it is running.
        connections: The number of clients that are connected, when it is running; perdure's own look isn't one.
    """

    running: bool
    kept: bool
    directory: Path
    url: str | None
    version: str | None = None
    pid: int | None = None
    connections: int | None = None


class Cluster:
    """The PostgreSQL of a folder. Making one of these does nothing; `acquire` does.

    Args:
        directory: The folder; it is made when it is missing. As root, it must be where every user can reach it.
        settings: Settings of PostgreSQL that this process gives a server that it starts, such as `{"fsync": "off"}`
            for one that is thrown away, or `{"listen_addresses": "127.0.0.1", "port": "5499"}`, from its first start on
            (then local users can connect without a password). Who joins a running server gets it as it is.
    """

    def __init__(self, directory: Path, *, settings: Mapping[str, str] | None = None) -> None:
        self.directory = directory.resolve()
        self._server = Server(self.directory, settings or {})
        self._guard = threading.RLock()
        self._users: int | None = None
        self._uses = 0
        _clusters.add(self)

    def __repr__(self) -> str:
        return f"Cluster({str(self.directory)!r})"

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def url(self) -> str:
        """How to connect to the database, running or not: for psycopg, psql, SQLAlchemy, asyncpg.

        It is the same across restarts.

        Raises:
            ConfigurationError: The cluster has never run, and its folder has too long a name for a socket; where the
                socket will be is decided by the first start.
        """
        folder = places.socket_folder(self.directory)
        if folder.parent == self.directory and not places.fits(folder):
            raise ConfigurationError(
                f"the embedded PostgreSQL in {str(self.directory)!r} has never run; `perdure postgres start` starts it"
            )
        return self._url(DATABASE)

    @property
    def port(self) -> int:
        """The port: part of the socket's name, and that of TCP where `listen_addresses` is set."""
        return self._server.port

    @property
    def log(self) -> Path:
        """What the server says."""
        return self._server.log

    def acquire(self) -> str:
        """Joins the server, and starts it when it isn't running; as often as you like, from any thread.

        The process is a user of the server until it has called `release` as often, or exits.

        Returns:
            The URL of the database, which exists.

        Raises:
            ConfigurationError: The server can't run here; says why.
        """
        with self._guard, self._control():
            users = self._users
            if users is None:
                users = locks.take(self.directory / "users.lock", locks.SHARED, _CONTROL_LIMIT)
            try:
                self._bring_up()
            except BaseException:
                if self._users is None:
                    os.close(users)
                raise
            self._users = users
            self._uses += 1
            _in_use.add(self)
            return self.url

    def release(self) -> None:
        """Undoes one `acquire`. The last one of the last process stops the server, unless it is to be kept."""
        with self._guard:
            if self._uses == 0:
                return
            self._uses -= 1
            if self._uses == 0:
                self._leave()

    def start(self, *, keep: bool = True) -> str:
        """Starts the server, if it isn't running, without becoming a user of it.

        Args:
            keep: It stays when its last user leaves, until `stop`.

        Returns:
            The URL of the database.
        """
        with self._guard, self._control():
            if keep:
                (self.directory / "keep").touch()
            self._bring_up()
            return self.url

    def stop(self, *, mode: StopMode = "fast") -> bool:
        """Stops the server, whoever uses it.

        Args:
            mode: "fast" disconnects the clients, "immediate" is a crash (the next start recovers).

        Returns:
            Whether it was running.
        """
        return self._end(lambda: self._server.stop(mode), forget=True)

    def kill(self) -> bool:
        """Kills the postmaster with SIGKILL, and waits for its children to go. Returns whether it was running."""
        return self._end(self._server.kill, forget=False)

    def restart(self, *, mode: StopMode = "fast") -> str:
        """Stops the server and starts it again, at the same URL, with nobody coming in between."""
        with self._guard, self._control():
            if self._server.is_alive():
                self._server.stop(mode)
            self._bring_up()
            return self.url

    def status(self) -> Status:
        """How the cluster is. Starts nothing, makes nothing, waits for nobody."""
        url = self._url(DATABASE) if places.socket_folder(self.directory).is_dir() else None
        kept = (self.directory / "keep").exists()
        if not self._server.is_alive() or not self._server.is_ready() or not self._server.is_reachable():
            return Status(running=False, kept=kept, directory=self.directory, url=url)
        try:
            with self._connect(5) as connection:
                row = connection.execute(
                    "SELECT current_setting('server_version'), count(*) FILTER (WHERE backend_type = 'client backend')"
                    " FROM pg_stat_activity WHERE application_name <> %s",
                    [_OWN_NAME],
                ).fetchone()
        except psycopg.OperationalError:
            return Status(running=False, kept=kept, directory=self.directory, url=url)
        version, connections = row if row is not None else (None, None)
        return Status(
            running=True,
            kept=kept,
            directory=self.directory,
            url=url,
            version=version,
            pid=self._server.pid,
            connections=connections,
        )

    def destroy(self) -> None:
        """Stops the server at once and deletes its folder with all data. For clusters that nobody else knows of."""
        self.stop(mode="immediate")
        with self._guard:
            if self._users is not None:
                os.close(self._users)
            self._users, self._uses = None, 0
            _in_use.discard(self)
        folder = places.socket_folder(self.directory)
        if folder.parent != self.directory:
            shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _leave_altogether(self) -> None:
        """Undoes all that this process has acquired."""
        with self._guard:
            self._uses = min(self._uses, 1)
            self.release()

    def _renew_guard(self) -> None:
        """Gives a forked child a lock of its own: the thread that held the parent's doesn't exist here."""
        self._guard = threading.RLock()

    def _leave(self) -> None:
        users, self._users = self._users, None
        _in_use.discard(self)
        assert users is not None
        if not self.directory.exists():
            os.close(users)
            return
        try:
            with self._control():
                os.close(users)
                users = None
                if (self.directory / "keep").exists():
                    return
                alone = locks.attempt(self.directory / "users.lock", locks.EXCLUSIVE)
                if alone is not None:
                    os.close(alone)  # joiners wait for control, not for this
                    if self._server.pid is not None:
                        self._server.stop("fast")
        finally:
            if users is not None:
                os.close(users)

    def _end(self, how: Callable[[], None], *, forget: bool) -> bool:
        if not self.directory.exists():
            return False
        with self._guard, self._control():
            if forget:
                (self.directory / "keep").unlink(missing_ok=True)
            if not self._server.is_alive():
                return False
            how()
            return True

    def _bring_up(self) -> None:
        """Starts the server unless it runs, and waits until its database answers."""
        self._server.trim_log()
        deadline = time.monotonic() + _START_LIMIT
        started = False
        answer = "no answer"
        while True:
            held = locks.attempt(self._server.lock, locks.EXCLUSIVE)
            if held is not None:
                try:
                    if started:
                        raise self._failure(f"doesn't start: {self._server.last_words()}")
                    self._server.start(held)
                    started = True
                finally:
                    os.close(held)
            elif self._server.is_ready():
                if started or self._server.is_reachable():
                    try:
                        return self._ensure_database()
                    except psycopg.OperationalError as error:
                        answer = str(error).strip()
                else:
                    self._server.stop("fast")  # somebody cleaned its socket away: a new one needs a new start
            if time.monotonic() > deadline:
                raise self._failure(f"hasn't come up for {_START_LIMIT:.0f} s: {answer}")
            time.sleep(_PAUSE)

    def _ensure_database(self) -> None:
        with self._connect(10) as connection:
            if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone() is None:
                connection.execute(f"CREATE DATABASE {DATABASE}")

    def _connect(self, timeout: int) -> psycopg.Connection:
        """A connection to see to the server itself. `status` doesn't count it as a client's.

        By its name: a session that was closed is still there for a moment, whoever closed it.
        """
        return psycopg.connect(
            self._url("postgres"), autocommit=True, connect_timeout=timeout, application_name=_OWN_NAME
        )

    def _failure(self, what: str) -> ConfigurationError:
        return ConfigurationError(
            f"the embedded PostgreSQL in {str(self.directory)!r} {what}; "
            f"see {str(self._server.log)!r}, or set PERDURE_DATABASE_URL=postgresql://..."
        )

    def _url(self, database: str) -> str:
        # Host and port as parameters: a path can't stand in the host's place, and PGPORT must not speak into it.
        folder = quote(os.fsencode(places.socket_folder(self.directory)), safe="/")
        return f"postgresql:///{database}?host={folder}&port={self.port}&user={ROLE}"

    @contextmanager
    def _control(self) -> Generator[None]:
        try:
            places.prepare_directory(self.directory, account_for(self.directory / "data"))
            with locks.section(self.directory / "control.lock", _CONTROL_LIMIT):
                yield
        except OSError as error:
            raise ConfigurationError(
                f"the embedded PostgreSQL can't use {str(self.directory)!r}: {error}; "
                "set PERDURE_EMBEDDED_DIR to a folder that it can use, or PERDURE_DATABASE_URL=postgresql://..."
            ) from error


def _leave_at_exit() -> None:
    for cluster in tuple(_in_use):
        try:
            cluster._leave_altogether()
        except ConfigurationError as error:
            print(f"perdure: {error}", file=sys.stderr)


def _forget_threads() -> None:
    for cluster in _clusters:
        cluster._renew_guard()


atexit.register(_leave_at_exit)
os.register_at_fork(after_in_child=_forget_threads)
