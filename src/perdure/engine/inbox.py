"""What was sent to a workflow and hasn't been received: `recv`, and who waits for what.

    sent -> its row, and a wake in the same statement -> loaded (with the claim, or at a look) -> received: a checkpoint

A message isn't touched when it is received: the checkpoint says its place, so whoever loads both knows what is left. A
run that dies before the checkpoint is durable has received nothing; one that suspends has seen all that it was woken
for, or the suspension is refused (see writer.py).

Messages of a topic go to those who wait for that topic in the order in which they asked, and in the order of their
places. Which one got which is recorded, so a replay doesn't ask again.

A message may be a question: its sender waits for an answer, which is an event named after it. Whether it may come in is
for the workflow's validator to say, before any code sees it: refused, it is gone, and leaves no checkpoint.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Protocol
from uuid import UUID

from perdure.engine import waiting
from perdure.engine.waiting import Waits
from perdure.errors import RunEnded
from perdure.model.records import Checkpoint, Message


class Inbox:
    """The messages of one run that its code hasn't received."""

    def __init__(
        self,
        messages: Iterable[Message],
        received: frozenset[int],
        waits: Waits,
        admits: Callable[[Message], bool],
    ) -> None:
        self.after = 0
        """The place of the last message that is known here."""
        self.questions: dict[int, UUID] = {}
        """The messages whose senders wait for an answer, by their places."""
        self.has_given = False
        """Whether the code has got a message from here."""
        self._received = received
        self._admits = admits
        self._waits = waits
        self._topics: dict[str, deque[Message]] = {}
        self._waiting: dict[str, deque[str]] = {}
        self._given: dict[str, Message] = {}
        self.put(messages)

    def put(self, messages: Iterable[Message]) -> bool:
        """These were sent, in the order of their places; what is known already is passed over.

        Returns whether there was something new.
        """
        before = self.after
        for message in messages:
            if message.place > self.after:
                self.after = message.place
                if message.question is not None:
                    self.questions[message.place] = message.question
                if message.place not in self._received and self._admits(message):
                    self._topics.setdefault(message.topic, deque()).append(message)
                    self._give(message.topic)
        return self.after > before

    def take(self, topic: str, key: str) -> Message | None:
        """The next message of a topic, for the call of that key; None: there is none for it."""
        if (given := self._given.pop(key, None)) is not None:
            return given
        messages = self._topics.get(topic)
        return messages.popleft() if messages else None

    def put_back(self, message: Message) -> None:
        """Its call was cancelled before it got it."""
        self._topics.setdefault(message.topic, deque()).appendleft(message)
        self._give(message.topic)

    def wait(self, topic: str, key: str) -> None:
        """The call of that key waits for a message of that topic."""
        self._waiting.setdefault(topic, deque()).append(key)

    def leave(self, topic: str, key: str) -> None:
        """It doesn't wait any more; what it was given and hasn't taken goes to the next one."""
        waiting = self._waiting[topic]
        if key in waiting:
            waiting.remove(key)
        if (given := self._given.pop(key, None)) is not None:
            self.put_back(given)

    def _give(self, topic: str) -> None:
        messages, waiting = self._topics[topic], self._waiting.get(topic)
        while messages and waiting:
            key = waiting.popleft()
            self._given[key] = messages.popleft()
            self._waits.release(key)


class Receiver(waiting.Waiter, Protocol):
    """What `recv` needs of its run."""

    @property
    def inbox(self) -> Inbox: ...
    def decoded(self, text: str) -> str: ...


async def receive(run: Receiver, key: str, topic: str, limit: timedelta | None) -> tuple[str, int]:
    """The payload of the next message of a topic, and its place.

    Raises:
        TimeoutError: None came in time.
    """
    recorded = run.history.pop(key, None)
    if recorded is not None:
        if recorded.kind != "message":
            raise run.mismatch(recorded, f"recv({topic!r})")
        await run.delivery.replay(recorded.position)
        if run.over:
            raise RunEnded
        if recorded.status != "success":
            raise TimeoutError
        return run.decoded(recorded.payload or "null"), recorded.args_hash
    if run.history or run.delivery.has_recorded:
        await run.delivery.live()
    message = run.inbox.take(topic, key)
    at: float | None = None
    if message is None:
        seconds = None if limit is None else waiting.begun(run, key, lambda: limit)
        run.inbox.wait(topic, key)
        try:
            due = await waiting.wait(run, key, "message", seconds)
            message = run.inbox.take(topic, key)
        finally:
            run.inbox.leave(topic, key)
        at = due if message is None else None
    try:
        position = await run.delivery.turn(at)
        status = "success" if message is not None else "error"
        place, payload = (message.place, message.payload) if message is not None else (0, None)
        run.record(Checkpoint(key, "message", position, status, payload, place))
        run.inbox.has_given |= message is not None
    except BaseException:
        if message is not None:
            run.inbox.put_back(message)
        raise
    if message is None:
        raise TimeoutError
    return run.decoded(message.payload), message.place
