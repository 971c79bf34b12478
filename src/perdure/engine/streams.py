"""What one run writes to streams: values that readers get as they come, such as the tokens of a language model.

    written -> it gets its place in the stream -> with the next flush it is there, in the order of the places

Entries go with the flushes of their run, so they are fenced like its outcomes, and many of them make one commit. What a
step writes is there before its outcome is, or with it. Nobody waits for each: only when a thousand of them haven't been
written yet, so that a fast step doesn't fill the memory.

A step's body may run again: another attempt, or another run after a crash. What it wrote before is still there, and the
new attempt's entries come behind it, as another *part* of the stream. A part is void when there is a newer one of the
same step, or when the outcome that was recorded is another attempt's. Readers skip what is void, or are told when it
becomes that after they have read it (perdure/streams.py).

Places are drawn before they are sent, and a flush that is sent again finds its own. A run that isn't the workflow's
first looks where the stream ends, once; nobody else can write to it meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, NamedTuple, Protocol, TypeVar
from uuid import UUID

from perdure.errors import RunEnded

T = TypeVar("T")

_MOST_PENDING = 1000


class Entry(NamedTuple):
    """One value in a stream."""

    name: str
    number: int
    part: int
    payload: str


class PartOfStream(NamedTuple):
    """Consecutive entries of one writer: of an attempt at a step, or of the workflow's own code (no key)."""

    name: str
    part: int
    key: str
    attempt: int
    first: int


class Records(Protocol):
    """Where entries go."""

    def stream(self, run: Writer, entry: Entry, part: PartOfStream | None) -> None: ...


class Exchange(Protocol):
    """Who knows where a stream ends."""

    def stream_end(self, owner: UUID, name: str) -> Coroutine[Any, Any, tuple[int, int]]: ...


class Host(Protocol):
    """What streams need of their process."""

    loop: asyncio.AbstractEventLoop

    @property
    def exchange(self) -> Exchange: ...


class Writer(Protocol):
    """What streams need of their run."""

    id: UUID
    epoch: int
    over: bool

    @property
    def host(self) -> Host: ...
    async def outside(self, work: Coroutine[Any, Any, T]) -> T: ...
    def put_in_stream(self, entry: Entry, part: PartOfStream | None) -> None: ...


class Streams:
    """The streams of one run."""

    def __init__(self) -> None:
        self._ends: dict[str, tuple[int, int]] = {}
        self._parts: dict[tuple[str, str], tuple[int, int]] = {}
        self._pending = 0
        self._room: asyncio.Future[None] | None = None

    async def open(self, run: Writer, name: str) -> None:
        """Find out where that stream ends, and wait until there is room for more."""
        if self._pending >= _MOST_PENDING and not run.over:
            await run.outside(self._wait_for_room(run))
        if name not in self._ends:
            end = (0, 0) if run.epoch == 1 else await run.outside(run.host.exchange.stream_end(run.id, name))
            self._ends.setdefault(name, end)  # another task may have been quicker, and have written
        if run.over:
            raise RunEnded

    async def _wait_for_room(self, run: Writer) -> None:
        while self._pending >= _MOST_PENDING and not run.over:
            if self._room is None or self._room.done():
                self._room = run.host.loop.create_future()
            await asyncio.shield(self._room)

    def put(self, run: Writer, name: str, payload: str, key: str, attempt: int) -> None:
        """Write one value to a stream that is open."""
        number, parts = self._ends[name]
        part, of_attempt = self._parts.get((name, key), (-1, 0))
        new: PartOfStream | None = None
        if part < 0 or of_attempt != attempt:
            part, parts = parts, parts + 1
            self._parts[name, key] = part, attempt
            new = PartOfStream(name, part, key, attempt, number)
        self._ends[name] = number + 1, parts
        self._pending += 1
        run.put_in_stream(Entry(name, number, part, payload), new)

    def written(self, entries: int) -> None:
        """So many are durable."""
        self._pending -= entries
        self.let_go()

    def let_go(self) -> None:
        """Whoever waits for room looks again."""
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
