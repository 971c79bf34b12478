"""What former runs of a workflow have recorded, sorted by what it is for."""

from __future__ import annotations

from perdure.model.keys import (
    INPUT,
    RESULT,
    attempted_key,
    intended_key,
    parent_key,
    timer_key,
    waited_key,
)
from perdure.model.records import Claim, Recorded

_UNFINISHED = {
    "attempt": attempted_key,
    "park": attempted_key,
    "intent": intended_key,
    "timer": waited_key,
    "start": parent_key,
}
"""Kinds of what is recorded of steps and waits that may have no outcome yet, and how to tell whose it is."""


class Memory:
    """The history of one workflow, as a claim brings it."""

    def __init__(self, claim: Claim) -> None:
        self.input = claim.input
        self.outcomes: dict[str, Recorded] = {}
        """What its code is to be served, by the keys of the calls."""
        self.failed_attempts: dict[str, Recorded] = {}
        """The last failed attempt of steps that have no outcome yet."""
        self.intents: dict[str, set[int]] = {}
        """Attempts that were about to begin, of steps that record that."""
        self.timers: dict[str, float] = {}
        """Waits that began, and the seconds that were left of them."""
        self.begun: dict[str, Recorded] = {}
        """Children that were started, by the keys of the calls."""
        self.requests: dict[str, str] = {}
        self.cancelled_at: Recorded | None = None
        self.attempt = 1
        """Which attempt at the whole workflow this is."""
        self.pause = 0.0
        """What is left until that may begin, in seconds."""
        self.runs: str | None = None
        """How often its code has begun anew; None: it hasn't."""
        self.begun_after = -1
        """The outcome behind which a wait or step began that has no outcome yet."""
        self.position = 0
        """The highest position of an outcome."""
        for recorded in claim.history:
            self._sort(recorded)
        for recorded in claim.history:
            if recorded.kind in _UNFINISHED:
                key = _UNFINISHED[recorded.kind](recorded.key)
                if key not in self.outcomes and key != RESULT:
                    self.begun_after = max(self.begun_after, recorded.position)

    def _sort(self, recorded: Recorded) -> None:
        match recorded.kind:
            case "input":
                self.input = recorded.payload or "{}"
            case "attempt" | "park":
                self._attempted(recorded)
            case "intent":
                self.intents.setdefault(intended_key(recorded.key), set()).add(recorded.attempts)
            case "timer":
                self.timers[waited_key(recorded.key)] = recorded.remaining or 0.0
                if recorded.key == timer_key(RESULT):
                    self.pause = max(self.pause, recorded.remaining or 0.0)
            case "start":
                self.begun[parent_key(recorded.key)] = recorded
            case "runs":
                self.runs = recorded.payload
            case "request":
                self.requests[recorded.key] = recorded.payload or "null"
            case "cancel":
                self.cancelled_at = recorded
                self.position = max(self.position, recorded.position)
            case _:
                if recorded.key != INPUT:
                    self.outcomes[recorded.key] = recorded
                    self.position = max(self.position, recorded.position)

    def _attempted(self, recorded: Recorded) -> None:
        key = attempted_key(recorded.key)
        if key == RESULT:
            self.attempt = max(self.attempt, recorded.attempts + 1)
            self.pause = max(self.pause, recorded.remaining or 0.0)
            return
        known = self.failed_attempts.get(key)
        if known is None or known.attempts < recorded.attempts:
            self.failed_attempts[key] = recorded
