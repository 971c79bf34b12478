"""A command in a process of its own, for tests."""

from __future__ import annotations

import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

from click.testing import Result

PERDURE = str(Path(sys.executable).with_name("perdure"))
PATIENCE = 30


class Process:
    """A command in a process of its own, whose output is waited for line by line."""

    def __init__(self, arguments: list[str], folder: Path, env: dict[str, str]) -> None:
        self._popen = subprocess.Popen(
            arguments, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        self.pid = self._popen.pid
        self.lines: list[str] = []
        self._arrived: queue.Queue[str | None] = queue.Queue()
        assert self._popen.stdout is not None
        assert self._popen.stderr is not None
        self._readers = [
            threading.Thread(target=self._read, args=(stream,)) for stream in (self._popen.stdout, self._popen.stderr)
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self._arrived.put(line.rstrip("\n"))
        self._arrived.put(None)

    def line(self, pattern: str) -> re.Match[str]:
        """The next line of stdout or stderr in which the pattern is found."""
        while True:
            try:
                line = self._arrived.get(timeout=PATIENCE)
            except queue.Empty:
                line = None
            if line is None:
                raise AssertionError(f"no line like {pattern!r} in:\n" + "\n".join(self.lines))
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found

    def send(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def code(self) -> int:
        """Wait for the end; returns the exit code as a shell has it."""
        code = self._popen.wait(PATIENCE)
        return code if code >= 0 else 128 - code

    def output(self) -> str:
        """Wait until nobody can write any more, children included; returns all lines."""
        for reader in self._readers:
            reader.join(PATIENCE)
            assert not reader.is_alive(), "somebody is left behind"
        while not self._arrived.empty():
            line = self._arrived.get()
            if line is not None:
                self.lines.append(line)
        return "\n".join(self.lines)

    def close(self) -> None:
        self._popen.kill()
        self._popen.wait()
        self.output()


Spawn = Callable[..., Process]
Run = Callable[..., Result]
