"""Several worker processes: one process starts them, starts them again when they die, and ends them in order.

    supervisor  <- channel -  child        "+" it is ready, "-" it isn't: twice a second or so; silence counts as "-"
                               channel closed: the supervisor is gone, so the child ends in order

- The first child starts alone. The others follow when it is ready for the first time: whatever is wrong with the code
  or the configuration is then said once. If it ends with exit code 2 before that, so does the supervisor.
- A child that dies is started again, with growing pauses; one that has lived for a minute begins with a short one.
- SIGTERM and SIGINT are passed on to all children as SIGTERM; when all have ended, the exit code is 0 if they ended in
  order. A second signal kills them. Each child has a process group of its own, so Ctrl-C reaches only this process.
- It reaps every child, also those that it inherits as PID 1.
"""

from __future__ import annotations

import logging
import os
import select
import selectors
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from types import FrameType

from perdure.cli.endings import FAILED, MISCONFIGURED
from perdure.cli.signals import ENDING, end_at_once
from perdure.store.pauses import backoff

_REPORT_SECONDS = 0.25
_BELIEVED_SECONDS = 5.0
_PROVEN_SECONDS = 60.0

_log = logging.getLogger("perdure.cli")


class Supervisor:
    """Keeps `count` processes of `command` running, until a signal.

    Args:
        command: The command of a child; the number of its channel's descriptor is appended.
        count: How many.
    """

    def __init__(self, command: Sequence[str], count: int) -> None:
        self._command = command
        self._places = [_Place(number) for number in range(count)]
        self._selector = selectors.DefaultSelector()
        self._signals: list[int] = []
        self._proven = False
        self._stopping = False
        self._code = 0

    @property
    def is_ready(self) -> bool:
        """Whether all of them are. Any thread may ask."""
        now = time.monotonic()
        return all(place.believed_until > now for place in self._places)

    def run(self) -> int:
        """Returns the exit code."""
        woken = self._catch_signals()
        self._selector.register(woken, selectors.EVENT_READ)
        self._places[0].due = 0.0
        while True:
            self._start_what_is_due()
            for key, _ in self._selector.select(self._pause()):
                self._hear(key.data, key.fileobj)
            self._obey()
            self._reap()
            if self._stopping and not any(place.process for place in self._places):
                return self._code

    # --- signals ---------------------------------------------------------------------------------------------------

    def _catch_signals(self) -> socket.socket:
        """The end of a pair of sockets that can be read when a signal has come."""
        woken, wakes = socket.socketpair()
        woken.setblocking(False)
        wakes.setblocking(False)
        signal.set_wakeup_fd(wakes.detach(), warn_on_full_buffer=False)
        for number in ENDING:
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGCHLD, _wake_only)
        return woken

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _obey(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            if self._stopping:
                self._send(signal.SIGKILL)
                end_at_once(number)
            _log.info("%s: all processes end in order; another signal ends them at once", signal.Signals(number).name)
            self._stop()

    def _stop(self) -> None:
        self._stopping = True
        self._send(signal.SIGTERM)

    def _send(self, number: int) -> None:
        for place in self._places:
            if place.process is not None:
                with suppress(ProcessLookupError):
                    os.kill(place.process.pid, number)

    # --- children --------------------------------------------------------------------------------------------------

    def _start_what_is_due(self) -> None:
        now = time.monotonic()
        for place in self._places:
            if not self._stopping and place.process is None and place.due is not None and place.due <= now:
                pid, channel = place.start(self._command)
                self._selector.register(channel, selectors.EVENT_READ, place)
                _log.info("process %d started", pid)

    def _pause(self) -> float | None:
        """How long nothing is due."""
        dues = [place.due for place in self._places if place.process is None and place.due is not None]
        return None if self._stopping or not dues else max(0.0, min(dues) - time.monotonic())

    def _hear(self, place: _Place | None, readable: object) -> None:
        assert isinstance(readable, socket.socket)
        try:
            said = readable.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        if place is None:
            return
        if not said:  # it has closed the channel: it ends, or is dead
            self._selector.unregister(readable)
            place.believed_until = 0.0
            return
        place.believed_until = time.monotonic() + _BELIEVED_SECONDS if said.endswith(b"+") else 0.0
        if b"+" in said and not self._proven:
            self._proven = True
            for other in self._places:
                if other.due is None:
                    other.due = 0.0

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for place in self._places:
                if place.process is not None and place.process.pid == pid:
                    self._ended(place, place.process, os.waitstatus_to_exitcode(status))

    def _ended(self, place: _Place, process: subprocess.Popen[bytes], code: int) -> None:
        process.returncode = code  # reaped behind its back
        if place.channel is not None and place.channel.fileno() in self._selector.get_map():
            self._selector.unregister(place.channel)
        lived = place.end()
        if self._stopping:
            if code not in (0, -signal.SIGTERM):  # a child that has no handlers yet dies of it, in perfect order
                self._code = self._code or FAILED
                _log.error("process %d %s", process.pid, _said(code))
        elif code == MISCONFIGURED and not self._proven:
            self._code = MISCONFIGURED
            self._stop()
        else:
            pause = place.pause(lived)
            place.due = time.monotonic() + pause
            _log.warning("process %d %s; another one starts in %.1f s", process.pid, _said(code), pause)


class _Place:
    """One of the processes: the one that runs, or the one that is to start."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.due: float | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.channel: socket.socket | None = None
        self.believed_until = 0.0
        self._started = 0.0
        self._pauses: Iterator[float] = backoff(0.5, 30.0)

    def start(self, command: Sequence[str]) -> tuple[int, socket.socket]:
        """Start the process. Returns its id, and this end of the channel."""
        self.channel, theirs = socket.socketpair()
        self.channel.setblocking(False)
        with theirs:
            self.process = subprocess.Popen(
                [*command, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, process_group=0
            )
        self._started = time.monotonic()
        return self.process.pid, self.channel

    def end(self) -> float:
        """The process is gone. Returns for how long it lived."""
        if self.channel is not None:
            self.channel.close()
        self.channel = self.process = None
        self.believed_until = 0.0
        return time.monotonic() - self._started

    def pause(self, lived: float) -> float:
        """How long to wait before the next one."""
        if lived > _PROVEN_SECONDS:
            self._pauses = backoff(0.5, 30.0)
        return next(self._pauses)


def report(descriptor: int, is_ready: Callable[[], bool], on_orphaned: Callable[[], None]) -> None:
    """The child's end of the channel, served by a thread of its own."""
    os.set_inheritable(descriptor, False)
    channel = socket.socket(fileno=descriptor)
    channel.setblocking(False)

    def serve() -> None:
        while not select.select([channel], [], [], _REPORT_SECONDS)[0]:
            with suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                channel.send(b"+" if is_ready() else b"-")
        on_orphaned()

    threading.Thread(target=serve, name="perdure-report", daemon=True).start()


def _wake_only(number: int, frame: FrameType | None) -> None:
    """A handler, so that the signal wakes the loop."""


def _said(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
