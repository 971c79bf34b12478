"""When a failed step is tried again: arithmetic only; who waits is the engine."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from random import Random


class RetryAfter(Exception):
    """Raised by a step: try again after this long.

    Attributes:
        delay: How long to wait.
        counts: Whether it counts as a failed attempt. False: a poll, which doesn't use up `max_attempts`.
    """

    def __init__(self, delay: timedelta, *, counts: bool = True) -> None:
        super().__init__(delay)
        self.delay = delay
        self.counts = counts

    def __str__(self) -> str:
        return f"try again after {self.delay}"


class Rerun(Exception):
    """Raised by the `in_doubt=` function of a step: its effect didn't happen, so run the step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How often and when a step is tried again.

    Attempts are recorded failures; one cut short by a crash is a recovery, not an attempt.

    Attributes:
        max_attempts: How many attempts there are in all; None: without end.
        initial: The pause after the first failure.
        factor: By how much each pause is longer than the one before.
        maximum: The longest pause.
        jitter: By which fraction of itself a pause is made longer or shorter, at random.
        retry_on: Errors that are worth another attempt.
        give_up_on: Those among them that aren't.
    """

    max_attempts: int | None = 3
    initial: timedelta = timedelta(seconds=1)
    factor: float = 2.0
    maximum: timedelta = timedelta(minutes=5)
    jitter: float = 0.1
    retry_on: tuple[type[Exception], ...] = (Exception,)
    give_up_on: tuple[type[Exception], ...] = ()

    def __post_init__(self) -> None:
        if self.max_attempts is not None and self.max_attempts < 1:
            raise ValueError(f"max_attempts={self.max_attempts} is no number of attempts; use 1 or more, or None")
        if self.factor < 1.0:
            raise ValueError(f"factor={self.factor} would make pauses shorter; use 1.0 or more")
        if not 0.0 <= self.jitter <= 1.0:
            raise ValueError(f"jitter={self.jitter} is no fraction; use 0.0 to 1.0")
        if self.initial < timedelta(0) or self.maximum < timedelta(0):
            raise ValueError("initial and maximum are pauses; use a timedelta of 0 or more")

    def pause(self, error: BaseException, attempt: int, random: Random) -> timedelta | None:
        """How long to wait after `attempt` (1, 2, ...) failed with `error`; None: give up."""
        exhausted = self.max_attempts is not None and attempt >= self.max_attempts
        if isinstance(error, RetryAfter):
            return error.delay if not error.counts or not exhausted else None
        if exhausted or not isinstance(error, self.retry_on) or isinstance(error, self.give_up_on):
            return None
        # A power that overflows means the maximum anyway.
        seconds = self.maximum.total_seconds()
        if attempt < 1000:
            try:
                seconds = min(seconds, self.initial.total_seconds() * self.factor ** (attempt - 1))
            except OverflowError:
                pass
        return timedelta(seconds=seconds * (1 + self.jitter * random.uniform(-1, 1)))


ONCE = Retry(max_attempts=1)
"""What a step without `retry=` does; `RetryAfter` has the attempts of a plain `Retry()`."""
