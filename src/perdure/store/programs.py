"""Operations of several statements, without I/O: a program yields (statement's name, parameters) and is sent the rows.

So the logic is written once, and runs on a connection of ours (`run_program`), or on a caller's own, in the caller's
transaction (`foreign`).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypeVar
from uuid import UUID

from perdure.errors import KeyConflict
from perdure.store.arrays import Array, Floats, Ints, Texts, Times, Uuids
from perdure.store.statements import SHARD

T = TypeVar("T")
Request = tuple[str, Sequence[Any]]
Program = Generator[Request, Sequence[Any], T]
OnConflict = Literal["attach", "raise", "replace_finished"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewWorkflow:
    """A workflow to be started."""

    id: UUID
    name: str
    queue: str
    input: str
    priority: int = 0
    partition: str | None = None
    attributes: str | None = None
    version: str | None = None
    key: str | None = None
    on_conflict: OnConflict = "attach"
    delay: float | None = None
    start_at: datetime | None = None
    timeout: float | None = None
    parent_id: UUID | None = None
    detached: bool = False

    @property
    def is_plain(self) -> bool:
        """Nothing can be in its way: no key, no time to wait for, and none to end at."""
        return self.key is None and self.delay is None and self.start_at is None and self.timeout is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """Under which id it runs, and whether this start made it."""

    id: UUID
    started: bool


def start(news: Sequence[NewWorkflow]) -> Program[list[Started]]:
    """Start plain workflows: one statement."""
    yield "start", start_params(news, None)
    return [Started(id=new.id, started=True) for new in news]


def start_keyed(news: Sequence[NewWorkflow], *, lock_timeout: str | None) -> Program[list[Started | KeyConflict]]:
    """Start workflows under keys, or later: those that are there already are found.

    Safe to send again: an id that is there already is this start's own. Where a finished one is replaced, the
    statements must run in one transaction.
    """
    outcomes: dict[UUID, Started | KeyConflict] = {}
    waiting = sorted(news, key=lambda new: (new.name, new.key or ""))
    while waiting:
        again: list[NewWorkflow] = []
        for batch in _without_twins(waiting):
            limits = (lock_timeout, *_kin_params(batch))
            rows = yield "start_keyed", (*_start_params(batch), *_later_params(batch), *limits)
            inserted = {row.id for row in rows}
            outcomes |= {new.id: Started(id=new.id, started=True) for new in batch if new.id in inserted}
            taken = [new for new in batch if new.id not in inserted]
            if taken:
                again += yield from _resolve(taken, outcomes)
        waiting = again
    return [outcomes[new.id] for new in news]


def _resolve(
    taken: Sequence[NewWorkflow], outcomes: dict[UUID, Started | KeyConflict]
) -> Generator[Request, Sequence[Any], list[NewWorkflow]]:
    """What to do about those that weren't inserted; returns the starts that are to be tried again."""
    there = yield "started", (SHARD, Uuids(new.id for new in taken))
    ours = {row.id for row in there}  # inserted by a statement whose answer was lost
    outcomes |= {new.id: Started(id=new.id, started=True) for new in taken if new.id in ours}
    again = [new for new in taken if new.id not in ours and new.key is None]
    taken = [new for new in taken if new.id not in ours and new.key is not None]
    if not taken:
        return again
    names, keys = Texts(new.name for new in taken), Texts(new.key for new in taken)
    holders = yield "holders", (SHARD, names, keys)
    by_key = {(row.name, row.key): row.id for row in holders}
    for new in taken:
        assert new.key is not None
        holder = by_key.get((new.name, new.key))
        if holder is None:
            again.append(new)  # whoever held it has gone in this moment
        elif new.on_conflict == "raise":
            outcomes[new.id] = KeyConflict(new.name, new.key, holder)
        elif new.on_conflict == "replace_finished" and (yield "release_key", (SHARD, new.name, new.key)):
            again.append(new)
        else:
            outcomes[new.id] = Started(id=holder, started=False)
    return again


def _without_twins(news: Iterable[NewWorkflow]) -> list[list[NewWorkflow]]:
    """Batches in which no key stands twice: the second must find the first."""
    batches: list[list[NewWorkflow]] = []
    seen: dict[tuple[str, str], int] = {}
    for new in news:
        index = 0 if new.key is None else seen.get((new.name, new.key), 0)
        if new.key is not None:
            seen[new.name, new.key] = index + 1
        if index == len(batches):
            batches.append([])
        batches[index].append(new)
    return batches


def start_params(news: Sequence[NewWorkflow], worker_id: UUID | None) -> tuple[Any, ...]:
    """The parameters of the statement `start`."""
    return (*_start_params(news), worker_id)


def _start_params(news: Sequence[NewWorkflow]) -> tuple[Any, ...]:
    return (
        SHARD,
        Uuids([new.id for new in news]),
        Texts([new.name for new in news]),
        Texts([new.queue for new in news]),
        Ints([new.priority for new in news]),
        Texts([new.partition for new in news]),
        Texts([new.attributes for new in news]),
        Texts([new.input for new in news]),
        Texts([new.version for new in news]),
    )


def _later_params(news: Sequence[NewWorkflow]) -> tuple[Array, ...]:
    return (
        Texts([new.key for new in news]),
        Floats([new.delay for new in news]),
        Times([new.start_at for new in news]),
    )


def _kin_params(news: Sequence[NewWorkflow]) -> tuple[Array, ...]:
    return (
        Floats([new.timeout for new in news]),
        Uuids([new.parent_id for new in news]),
        Ints([int(new.detached) for new in news]),
    )
