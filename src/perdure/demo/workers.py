"""The workers of the demo, seen from outside: started, killed, stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from perdure.config import DATABASE_URL

_PATIENCE_SECONDS = 10.0


class Broken(Exception):
    """The demo can't go on."""


class WorkerProcess:
    """One worker, in a process of its own.

    Args:
        letter: What it is called.
        url: The database.
        folder: Where its journal and its log go.
    """

    def __init__(self, letter: str, url: str, folder: Path) -> None:
        self.letter = letter
        self._journal = folder / f"{letter}.journal"
        self._log = folder / f"{letter}.log"
        self._journal.touch()
        with self._log.open("wb") as log:
            # A session of its own, so that Ctrl-C doesn't reach it; a pipe as stdin, which ends if this process dies.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "perdure.demo.worker_process", str(self._journal)],
                env={**os.environ, DATABASE_URL: url},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __str__(self) -> str:
        return f"worker {self.letter} (process {self.pid})"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def bodies(self) -> list[str]:
        """The step bodies that it began, as `workflow_id key`."""
        return self._journal.read_text(encoding="utf-8").splitlines()

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def end(self) -> None:
        """SIGTERM, which it obeys in order; `ended` waits for that."""
        self._process.terminate()

    def ended(self) -> None:
        """Wait until it is gone; SIGKILL if it takes too long."""
        try:
            self._process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def check(self) -> None:
        """Go on only if it is alive.

        Raises:
            Broken: It has ended by itself.
        """
        if not self.is_alive:
            raise Broken(f"{self} ended by itself, with code {self._process.returncode}:\n{self.last_words()}")

    def last_words(self) -> str:
        """The end of what it logged."""
        return self._log.read_text(encoding="utf-8", errors="replace")[-2000:]
