"""Worker processes, as tests see them: start, wait for what they say, send signals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PROGRAMS = Path(__file__).parent / "programs"


class WorkerProcess:
    """A worker that runs in a process of its own."""

    def __init__(self, *, program: str = "worker.py", **options: Any) -> None:
        self.events: list[dict[str, Any]] = []
        self._news = threading.Condition()
        self._process = subprocess.Popen(
            [sys.executable, str(_PROGRAMS / program), json.dumps(options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self.errors = ""
        self._readers = [
            threading.Thread(target=self._read_events, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    async def said(
        self, event: str, fits: Callable[[dict[str, Any]], bool] = lambda _: True, *, timeout: float = 30
    ) -> dict[str, Any]:
        """The first event of that name that fits, past or to come."""
        return await asyncio.to_thread(self._said, event, fits, timeout)

    def _said(self, event: str, fits: Callable[[dict[str, Any]], bool], timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        seen = 0
        with self._news:
            while True:
                for one in self.events[seen:]:
                    if one["event"] == event and fits(one):
                        return one
                seen = len(self.events)
                left = deadline - time.monotonic()
                assert left > 0, f"worker {self.pid} hasn't said {event}; {self.errors}{self.events[-20:]}"
                assert self._process.poll() is None or self._readers[0].is_alive(), (
                    f"worker {self.pid} has ended ({self._process.returncode}) without {event}: {self.errors}"
                )
                self._news.wait(min(left, 0.1))

    def all(self, event: str) -> list[dict[str, Any]]:
        """The events of that name so far."""
        return [one for one in list(self.events) if one["event"] == event]

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self._process.kill()
        self._process.wait(10)

    async def ended(self, timeout: float = 30) -> int:
        """Wait for its end; returns its exit code."""
        return await asyncio.to_thread(self._process.wait, timeout)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def dispose(self) -> None:
        """It is gone after this, whatever state it was in."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(10)
        for reader in self._readers:
            reader.join(10)
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def _read_events(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                with self._news:
                    self.events.append(json.loads(line))
                    self._news.notify_all()

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.errors += line
