"""Group commit: what all runs of a worker record goes through one writer, many outcomes a commit.

While one flush is in flight the next one gathers; an idle writer flushes at once. An outcome that another run would get
again without any effect (of a child, of a pure step) isn't in a hurry: it waits for something that is, for a few
milliseconds at most, so that a fan-in of thousands doesn't make a flush for each. A flush is one statement, one commit,
one fsync. It begins by locking the entries that it writes for (`record`: FOR SHARE; `complete`: those that end, FOR
UPDATE), and every other part of it reads from those locks, so

- claim, recovery, release and terminate wait for the flush, or the flush finds an entry missing: an old epoch can never
  commit after a new one has loaded the history;
- all of it is written or nothing.

States of a part (what one run puts into a flush): gathered -> in flight -> written | lost | refused.

A part may also put off timers: their rows are written over. As often as it is written, such a row is the same, and its
time only moves on, so a flush that comes late can't make one early. It doesn't tell whether a flush was committed: an
earlier one may have left it there.

A part may start children: their rows, inputs and entries are inserted with the checkpoint that says so, or neither is.
One that ends a child puts a note for its parent into the outbox, in the same flush: the parent may be anywhere, and its
entry isn't locked here, because two workers with parents and children of each other would wait for one another. Whoever
finds the note tells the parent (parents.py).

What one run records in a breath (ten thousand children, say) is written in several flushes, oldest first: each of them
is a place where it could have stopped anyway.

Entries of streams go along; their places are drawn before, so a flush that is sent again finds its own.

A part may end its run (its result) or let it leave memory (its suspension), behind all outcomes that it carries. A
suspension names how often the run has seen itself woken; where the entry says more, somebody has something for it, and
the run stays (`awoken`). Both sides lock the entry, so one of them comes first: the sender finds the entry, and the
suspension is refused, or the suspension is committed, and the sender finds the `waits` row.

What can go wrong, and why it is safe:

- *Not held*: an entry has gone to somebody else (recovered, terminated). Nothing was written. A fresh read of the
  entries says whose; those runs are lost (all their outcomes with them), the rest is sent again.
- *Refused*: the database won't take some row (its data, or a checkpoint is there already). Halve until the culprit is
  alone; only its run is told. The others commit.
- *Interrupted, nothing sent*: again, until the database is back. The runs wait at their barriers meanwhile; when the
  lease is over, they end, and so do their parts.
- *In doubt*: the connection went while the statement was in flight. It is sent again, the same rows and nothing added.
  What the first one may have done shows then: a flush is one transaction, so if any one row of it stands there with our
  (worker id, epoch), all of it was committed. That is asked whenever the second finds something missing (the first has
  deleted the entries) or already there (the first has inserted). If the first reaches the server after the second, it
  finds the same, and writes nothing. Once in doubt, a part stays in doubt: also its halves ask.
- *The process dies*: what wasn't committed is lost, and no effect was started that depended on it (the barrier of the
  run); somebody else replays from what is there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, Protocol
from uuid import UUID

import psycopg

from perdure import telemetry
from perdure.engine.streams import Entry, PartOfStream
from perdure.errors import ConfigurationError
from perdure.model.keys import RESULT
from perdure.model.records import Checkpoint, Suspension
from perdure.store.arrays import Array, BigInts, Floats, Ints, Texts, Times, Uuids, columns
from perdure.store.database import Database, Interrupted
from perdure.store.pauses import backoff
from perdure.store.programs import NewWorkflow
from perdure.store.statements import SHARD

_PATIENCE_SECONDS = 0.01
_MAX_ROWS = 3000
_ROWS_PER_CHILD = 4
_MAX_BYTES = 8 * 1024 * 1024
_WITNESSES = 100
_NOBODY: frozenset[UUID] = frozenset()
_CHILDREN = (Uuids, Texts, Texts, Ints, Texts, Texts, Texts, Texts, Uuids, Ints, Floats, Times, Floats, Times)
_COLUMNS = (Uuids, BigInts, Texts, Texts, Ints, Texts, Texts, BigInts, Ints, Floats, Floats)


class Writing(Protocol):
    """A run, as the writer sees it."""

    id: UUID
    name: str
    worker_id: UUID
    epoch: int
    recoveries: int
    started_at: datetime
    deadline: datetime | None
    parent_id: UUID | None

    def written(self, checkpoints: int) -> None:
        """So many of its outcomes, the oldest ones, are durable."""

    def streamed(self, entries: int) -> None:
        """So many entries of its streams are durable."""

    def born(self, queues: set[str]) -> None:
        """Children of it are pending in these queues."""

    def ended(self, status: str, payload: str) -> None:
        """Its result is durable."""

    def suspended(self) -> None:
        """It waits in the database now."""

    def awoken(self) -> None:
        """It doesn't: somebody has something for it."""

    def lost(self, reason: str) -> None:
        """This worker doesn't hold it any more."""

    def refused(self, reason: str) -> None:
        """The database won't take what it records."""


class Part:
    """What one run puts into a flush."""

    __slots__ = ("checkpoints", "children", "entries", "parts", "put_off", "result", "run", "size", "suspension")

    def __init__(self, run: Writing) -> None:
        self.run = run
        self.checkpoints: list[Checkpoint] = []
        self.children: list[tuple[int, NewWorkflow]] = []
        """What it starts, and how many checkpoints there were with the one that says so."""
        self.entries: list[Entry] = []
        self.parts: list[PartOfStream] = []
        self.put_off: dict[str, tuple[int, float]] = {}
        self.result: tuple[str, str] | None = None
        self.suspension: Suspension | None = None
        self.size = 0

    @property
    def rows(self) -> int:
        """About how many rows it writes."""
        children = _ROWS_PER_CHILD * len(self.children)
        return len(self.checkpoints) + len(self.put_off) + len(self.entries) + children + 1

    def head(self) -> Part:
        """Its oldest checkpoints, taken from it: as many as one flush should carry."""
        count = _MAX_ROWS // (_ROWS_PER_CHILD + 1 if self.children else 1)
        head = Part(self.run)
        head.checkpoints, self.checkpoints = self.checkpoints[:count], self.checkpoints[count:]
        head.children = [each for each in self.children if each[0] <= count]
        head.entries, self.entries = self.entries, []  # what a step has written comes before its outcome, or with it
        head.parts, self.parts = self.parts, []
        head.size = sum(len(each.payload or "") for each in head.checkpoints)
        self.size -= head.size
        self.children = [(number - count, child) for number, child in self.children if number > count]
        return head


class Writer:
    """Gathers what runs record, and flushes it: one task, one flush at a time."""

    def __init__(
        self,
        database: Database,
        version: str,
        *,
        time: Callable[[], float] = time.monotonic,
        on_room: Callable[[], None] | None = None,
    ) -> None:
        self._database = database
        self._version = version
        self._time = time
        self._on_room = on_room
        self._parts: dict[Writing, Part] = {}
        self._size = 0  # of all of them
        self._gathered = asyncio.Event()
        self._hurried = asyncio.Event()  # there is something that shouldn't wait
        self._idle = asyncio.Event()
        self._idle.set()
        self.flushes = 0
        """How many have begun: there is one at a time."""

    # --- what runs ask for -----------------------------------------------------------------------------------------

    def record(
        self, run: Writing, checkpoint: Checkpoint, child: NewWorkflow | None = None, *, is_patient: bool = False
    ) -> None:
        """An outcome of a run that goes on; or that it starts a child. A patient one may wait for others a little."""
        part = self._part(run, is_patient=is_patient)
        part.checkpoints.append(checkpoint)
        size = len(checkpoint.payload or "")
        if child is not None:
            part.children.append((len(part.checkpoints), child))
            size += len(child.input)
        part.size += size
        self._size += size

    def stream(self, run: Writing, entry: Entry, part: PartOfStream | None) -> None:
        """A value in a stream; and the part that begins with it."""
        gathered = self._part(run)
        gathered.entries.append(entry)
        gathered.size += len(entry.payload)
        self._size += len(entry.payload)
        if part is not None:
            gathered.parts.append(part)

    def put_off(self, run: Writing, key: str, seconds: float, position: int) -> None:
        """A timer of a run that is set again and again: the latest is the one that counts."""
        self._part(run).put_off[key] = (position, seconds)

    def complete(self, run: Writing, status: str, payload: str) -> None:
        """The end of a run: in one flush with whatever of it isn't durable yet."""
        part = self._part(run)
        part.result = (status, payload)
        part.suspension = None  # something that perdure doesn't know has woken it meanwhile
        part.size += len(payload)
        self._size += len(payload)

    def suspend(self, run: Writing, suspension: Suspension) -> None:
        """A run leaves memory: in one flush with whatever of it isn't durable yet."""
        self._part(run).suspension = suspension

    def discard(self, run: Writing) -> None:
        """That run is over here: what it had gathered is dropped."""
        part = self._parts.pop(run, None)
        if part is not None:
            self._size -= part.size

    @property
    def is_full(self) -> bool:
        """Whether more is gathered than the next flush carries: what is to be written comes faster than it is."""
        return self._size >= _MAX_BYTES or len(self._parts) >= _MAX_ROWS

    @property
    def backlog(self) -> int:
        """How many runs wait to be written."""
        return len(self._parts)

    @property
    def is_idle(self) -> bool:
        """Whether everything that was gathered is written or lost."""
        return self._idle.is_set()

    async def drained(self) -> None:
        """Wait until everything that was gathered is written or lost."""
        self.hurry()
        await self._idle.wait()

    def hurry(self) -> None:
        """Somebody waits for what was gathered."""
        if self._parts:
            self._hurried.set()

    def _part(self, run: Writing, *, is_patient: bool = False) -> Part:
        part = self._parts.get(run)
        if part is None:
            part = self._parts[run] = Part(run)
            self._idle.clear()
            self._gathered.set()
        if not is_patient:
            self._hurried.set()
        return part

    # --- the one task ----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Flush until cancelled."""
        while True:
            await self._gathered.wait()
            if not self._hurried.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(_PATIENCE_SECONDS):
                        await self._hurried.wait()
            self._hurried.clear()
            if telemetry.wanted(telemetry.FlushBegins):
                telemetry.emit(telemetry.FlushBegins(workflows=len(self._parts)))
            was_full = self.is_full
            parts = self._gather()
            self._size = sum(part.size for part in self._parts.values())
            if was_full and self._on_room is not None:
                self._on_room()
            self.hurry()  # for the rest, if it is more than one flush carries
            if parts:
                self.flushes += 1
                await self._flush(parts)
            if not self._parts:
                self._gathered.clear()
                self._idle.set()

    def _gather(self) -> list[Part]:
        """The oldest parts, of one worker id, up to what one flush should carry."""
        taken: list[Part] = []
        rows = size = 0
        for part in self._parts.values():
            if not taken and part.rows > _MAX_ROWS and len(part.checkpoints) > 1:
                self._parts[part.run] = self._parts.pop(part.run)  # the others' turn comes before the rest of it
                return [part.head()]
            if taken and (
                rows >= _MAX_ROWS or size + part.size > _MAX_BYTES or part.run.worker_id != taken[0].run.worker_id
            ):
                break
            taken.append(part)
            rows += part.rows
            size += part.size
        for part in taken:
            del self._parts[part.run]
        return taken

    async def _flush(self, parts: list[Part], *, in_doubt: bool = False) -> None:
        """Write these parts, or find out which can't be; returns when each was told."""
        pauses = backoff()
        interrupted = False
        while parts:
            try:
                awake = await self._write(parts)
                if awake is None and in_doubt and await self._was_committed(parts):
                    awake = await self._awake(parts)
                if awake is not None:
                    return self._acknowledge(parts, awake)
                parts = await self._without_lost(parts)
            except Interrupted as interruption:
                if interruption.outcome_unknown:
                    in_doubt = True
                    telemetry.emit(telemetry.FlushInDoubt(workflows=len(parts), reason=interruption.reason))
                elif not interrupted:
                    telemetry.emit(telemetry.DatabaseLost(component="writer", reason=interruption.reason))
                interrupted = True
                await asyncio.sleep(next(pauses))
            except ConfigurationError as error:
                telemetry.emit(telemetry.DatabaseLost(component="writer", reason=str(error)))
                await asyncio.sleep(next(pauses))
            except psycopg.Error as error:
                return await self._split(parts, error, in_doubt=in_doubt)
        return None

    async def _split(self, parts: list[Part], error: psycopg.Error, *, in_doubt: bool) -> None:
        """Something among these is refused: halve, until the culprit is alone."""
        if in_doubt:
            awake = await self._settled(parts)
            if awake is not None:
                return self._acknowledge(parts, awake)
        if len(parts) > 1:
            middle = len(parts) // 2
            await self._flush(parts[:middle], in_doubt=in_doubt)
            await self._flush(parts[middle:], in_doubt=in_doubt)
            return None
        run = parts[0].run
        reason = str(error).partition("\n")[0]
        if isinstance(error, psycopg.errors.UniqueViolation):
            return run.lost(f"one of its checkpoints is there already ({reason})")
        telemetry.emit(telemetry.CheckpointRefused(workflow_id=run.id, name=run.name, reason=reason))
        return run.refused(reason)

    def _acknowledge(self, parts: list[Part], awake: frozenset[UUID]) -> None:
        if telemetry.wanted(telemetry.FlushCommitted):
            telemetry.emit(
                telemetry.FlushCommitted(
                    workflows=len(parts),
                    checkpoints=sum(len(part.checkpoints) for part in parts),
                    ended=sum(part.result is not None for part in parts),
                    suspended=sum(part.suspension is not None for part in parts) - len(awake),
                )
            )
        for part in parts:
            if part.checkpoints:
                part.run.written(len(part.checkpoints))
            if part.entries:
                part.run.streamed(len(part.entries))
            if part.children:
                part.run.born({child.queue for _, child in part.children})
            if part.result is not None:
                part.run.ended(*part.result)
            elif part.suspension is not None and part.run.id in awake:
                part.run.awoken()
            elif part.suspension is not None:
                part.run.suspended()

    # --- statements ------------------------------------------------------------------------------------------------

    async def _write(self, parts: Sequence[Part]) -> frozenset[UUID] | None:
        """One flush: which runs don't suspend after all; None: something isn't held, and nothing was written."""
        worker_id = parts[0].run.worker_id
        going = [part.run for part in parts if part.result is None and part.suspension is None]
        rows = [(part.run.id, part.run.epoch, *checkpoint) for part in parts for checkpoint in part.checkpoints]
        recorded: list[Any] = [
            SHARD,
            worker_id,
            Uuids([run.id for run in going]),
            sum(run.epoch for run in going),
            self._version,
            *columns(rows, _COLUMNS),
        ]
        ended = [(part.run, *part.result) for part in parts if part.result is not None]
        suspended = [(part.run, part.suspension) for part in parts if part.suspension is not None]
        put_off = [(part.run.id, part.run.epoch, key, *timer) for part in parts for key, timer in part.put_off.items()]
        children = [(child, part.run) for part in parts for _, child in part.children]
        parents = {run.parent_id for run, _, _ in ended if run.parent_id is not None}
        entries = [(part.run.id, *entry) for part in parts for entry in part.entries]
        is_more = bool(suspended or put_off or children or parents or entries)
        if not ended and not is_more:
            (answer,) = await self._database.attempt("record", *recorded)
            return _NOBODY if answer.held else None
        results: list[Array | int] = [
            Uuids([run.id for run, _, _ in ended]),
            sum(run.epoch for run, _, _ in ended),
            Texts([status for _, status, _ in ended]),
            Texts([payload for _, _, payload in ended]),
            BigInts([run.epoch for run, _, _ in ended]),
            Ints([run.recoveries for run, _, _ in ended]),
            Times([run.started_at for run, _, _ in ended]),
        ]
        if not is_more:
            (answer,) = await self._database.attempt("complete", *recorded, *results)
            return _NOBODY if answer.held else None
        now = self._time()
        asides = [(run.id, key) for run, suspension in suspended for key in suspension.aside]
        (answer,) = await self._database.attempt(
            "settle",
            *recorded,
            *results,
            Uuids([run.id for run, _ in suspended]),
            sum(run.epoch for run, _ in suspended),
            BigInts([suspension.seen for _, suspension in suspended]),
            Texts([suspension.waiting_for for _, suspension in suspended]),
            Floats([None if due is None else max(0.0, due - now) for _, (_, due, *_) in suspended]),
            *columns(asides, (Uuids, Texts)),
            *columns(put_off, (Uuids, BigInts, Texts, Ints, Floats)),
            Ints([int(suspension.hears) for _, suspension in suspended]),
            Ints([int(suspension.awaits_child) for _, suspension in suspended]),
            *columns([_row(child, run) for child, run in children], _CHILDREN),
            Uuids(parents),
            *columns(entries, (Uuids, Texts, BigInts, Ints, Texts)),
            *columns(
                [(part.run.id, part.run.epoch, *begun) for part in parts for begun in part.parts],
                (Uuids, BigInts, Texts, Ints, Texts, Ints, BigInts),
            ),
        )
        return frozenset(answer.awake) if answer.held else None

    async def _was_committed(self, parts: Sequence[Part]) -> bool:
        """Whether a flush without an answer took effect: any one of its rows tells."""
        rows = [(part.run.id, checkpoint.key, part.run.epoch) for part in parts for checkpoint in part.checkpoints]
        rows += [(part.run.id, RESULT, part.run.epoch) for part in parts if part.result is not None]
        if not rows:
            return False  # suspensions only: who isn't held is over here, one way or the other
        witnesses = columns(rows[:_WITNESSES], (Uuids, Texts, BigInts))
        (answer,) = await self._database.attempt("recorded", SHARD, parts[0].run.worker_id, *witnesses)
        return bool(answer.committed)

    async def _awake(self, parts: Sequence[Part]) -> frozenset[UUID]:
        """Of a flush that was committed: which of its suspensions were refused. Their entries are still held."""
        runs = [part.run for part in parts if part.suspension is not None]
        if not runs:
            return _NOBODY
        rows = await self._database.attempt("held_among", SHARD, runs[0].worker_id, Uuids([run.id for run in runs]))
        held = {(row.workflow_id, row.epoch) for row in rows}
        return frozenset(run.id for run in runs if (run.id, run.epoch) in held)

    async def _settled(self, parts: Sequence[Part]) -> frozenset[UUID] | None:
        """Whether it was, and the same, asked until the database answers."""
        for pause in backoff():
            try:
                return await self._awake(parts) if await self._was_committed(parts) else None
            except (Interrupted, ConfigurationError):
                await asyncio.sleep(pause)
        raise AssertionError("backoff never ends")

    async def _without_lost(self, parts: list[Part]) -> list[Part]:
        """Tell the runs that this worker no longer holds; returns the parts of the others."""
        worker_id = parts[0].run.worker_id
        ids = Uuids([part.run.id for part in parts])
        rows = await self._database.attempt("held_among", SHARD, worker_id, ids)
        held = {row.workflow_id: row.epoch for row in rows}
        rest: list[Part] = []
        for part in parts:
            if held.get(part.run.id) == part.run.epoch:
                rest.append(part)
            else:
                part.run.lost("another worker or an operator has taken it")
        return rest


def _row(new: NewWorkflow, parent: Writing) -> tuple[Any, ...]:
    """The columns of a child."""
    deadline = None if new.detached else parent.deadline
    return (
        new.id, new.name, new.queue, new.priority, new.partition, new.attributes, new.input, new.version, parent.id,
        int(new.detached), new.delay, new.start_at, new.timeout, deadline,
    )  # fmt: skip
