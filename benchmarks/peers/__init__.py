"""The systems beside which perdure is measured: the same backlog, on the same server, in turn with ours.

Each is a module of that name, run as `python -m benchmarks.peers.NAME start|work URL SETTING [COUNT]`: it installs
itself in an empty database and fills a queue, or is a worker until its stdin ends. How each was tuned in its own favour
is written down in its module.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

S = TypeVar("S")

NAMES = ("dbos", "absurd", "pgqueuer", "procrastinate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """What the measurement has to know of one.

    Attributes:
        does: What it runs: "one-step workflow", "no-op job".
        count: How many of them.
        settings: The names of the settings that it is run with.
        left: SQL: how many are left.
        drained: SQL: in how many seconds, by the database's own clock, how many were run.
    """

    does: str
    count: int
    settings: tuple[str, ...]
    left: str
    drained: str


def main(
    settings: Mapping[str, S],
    start: Callable[[str, S, int], Any],
    work: Callable[[str, S], Any],
) -> None:
    """What each of the modules does as a program."""
    verb, url, name, *rest = sys.argv[1:]
    done = start(url, settings[name], int(rest[0])) if verb == "start" else work(url, settings[name])
    if inspect.isawaitable(done):
        asyncio.run(_awaited(done))


async def _awaited(done: Any) -> None:
    await done


async def until_stdin_ends() -> None:
    """A worker's work is over when nobody needs it any more."""
    print("works", flush=True)
    await asyncio.to_thread(sys.stdin.read)
