"""SIGTERM and SIGINT: the first asks for an orderly end, the second is the end.

The handlers are there from the start, since the kernel ignores a signal to PID 1 that has none.

Python runs a handler in the main thread, which may be stuck: a step that blocks the event loop sleeps on, where the
kernel gave the signal to another thread. So a thread hears of each signal, too, through the descriptor that Python's
own C handler writes to at once. Both count; a signal may reach either of them alone, so the larger count is right.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

ENDING = (signal.SIGTERM, signal.SIGINT)


class Stopping:
    """Whether this process was asked to end."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """Why it is to end; None: it isn't."""
        self._wake: Callable[[], None] | None = None
        self._counts = Counter[str]()
        self._heard, self._written = socket.socketpair()
        self._written.setblocking(False)
        self._former = -1

    def install(self) -> None:
        """Handle the signals from now on. Until `wakes` is called there is nothing to end in order: exit code 0."""
        for number in ENDING:
            signal.signal(number, self._handle)
        self._take_descriptor()
        os.register_at_fork(before=_hold_back, after_in_parent=_let_through, after_in_child=_forget)
        threading.Thread(target=self._listen, name="perdure-signals", daemon=True).start()

    def wakes(self, wake: Callable[[], None]) -> None:
        """Call `wake` at the first request, from any thread; at once if it has come already."""
        self._take_descriptor()  # an event loop may have taken it
        self._wake = wake
        if self.reason is not None:
            wake()

    def ask(self, reason: str) -> None:
        """Ask for an orderly end, from any thread."""
        if self.reason is None:
            self.reason = reason
            if self._wake is not None:
                self._wake()

    def _take_descriptor(self) -> None:
        former = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        if former != self._written.fileno():
            self._former = former

    def _listen(self) -> None:
        while numbers := self._heard.recv(64):
            for number in numbers:
                if number in ENDING:
                    self._arrived("heard", number)
                elif self._former >= 0:
                    with suppress(OSError):
                        os.write(self._former, bytes([number]))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._arrived("handled", number)
        if self._wake is None:
            raise SystemExit(0)

    def _arrived(self, how: str, number: int) -> None:
        self._counts[how] += 1
        if self._counts[how] > 1:
            end_at_once(number)
        self.ask(signal.Signals(number).name)


def end_at_once(number: int) -> NoReturn:
    """As if the signal had killed this process. By hand: the kernel doesn't kill PID 1 by a signal from inside."""
    os._exit(128 + number)


# A forked child (multiprocessing) isn't the worker: signals do to it what they do to any process. They are held back
# until that is so; else one that comes early would be written to the descriptor, and be taken for the worker's.

_held = threading.local()


def _hold_back() -> None:
    _held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)


def _let_through() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _held.mask)


def _forget() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _let_through()
