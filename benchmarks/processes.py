"""Processes that do the work, and what they take: from /proc, so on Linux."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


@contextmanager
def role(module: str, *arguments: object, env: Mapping[str, str] | None = None) -> Generator[subprocess.Popen[str]]:
    """A module of the benchmarks in a process of its own, from the line that it says first to the end of the block.

    Then its stdin ends, which tells it to stop.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    with subprocess.Popen(
        command, env={**os.environ, **(env or {})}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if not process.stdout.readline():
                raise RuntimeError(f"{' '.join(command)} ended before it began, with code {process.wait()}")
            yield process
        finally:
            process.stdin.close()
            process.wait(60)


def run(module: str, *arguments: object, env: Mapping[str, str] | None = None) -> str:
    """A module of the benchmarks in a process of its own, to its end; returns what it printed."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **(env or {})}, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def processor_seconds(pid: int, *, family: bool = False) -> float:
    """How much processor time a process has taken; `family`: with its children, those that ended included."""
    total = _ticks(pid, ended_children=family)
    if family:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                total += _ticks(int(child), ended_children=True)
    return total / _TICK


def resident_mib(pid: int) -> float:
    """How much memory of a process is in memory."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(pid)


def _ticks(pid: int, *, ended_children: bool) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0  # it has just ended: its parent has it now
    own, ended = int(fields[11]) + int(fields[12]), int(fields[13]) + int(fields[14])
    return own + (ended if ended_children else 0)
