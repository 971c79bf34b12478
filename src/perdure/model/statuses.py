"""The states of a workflow, and the moves between them: the machine as data."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """Where a workflow stands. The last three are final."""

    PENDING = "pending"
    RUNNING = "running"
    WAITING = "waiting"
    SUCCESS = "success"
    ERROR = "error"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self not in MOVES


MOVES: dict[Status, frozenset[Status]] = {
    Status.PENDING: frozenset({Status.RUNNING, Status.WAITING, Status.CANCELLED}),
    Status.RUNNING: frozenset({Status.PENDING, Status.WAITING, Status.SUCCESS, Status.ERROR, Status.CANCELLED}),
    Status.WAITING: frozenset({Status.PENDING, Status.CANCELLED}),
}
"""From each status that isn't final to those that may follow: recovery and hand-over are running -> pending."""
