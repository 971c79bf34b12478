"""`answering`: a question that somebody asked this workflow, and the answer that it gives."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Generic, cast
from uuid import UUID

from typing_extensions import TypeForm, TypeVar

from perdure import failures
from perdure.annotations import ANY
from perdure.authoring.context import Context, required
from perdure.authoring.messages import FOR_EVER, dumped
from perdure.authoring.steps import step
from perdure.codec import shape
from perdure.errors import RunEnded, SerializationError, Unanswered, WrongPlace
from perdure.model.keys import check_name

T = TypeVar("T", default=Any)


class Question(Generic[T]):
    """What `handle.ask` sent.

    Attributes:
        value: What was asked.
    """

    def __init__(self, value: T, topic: str, limit: int) -> None:
        self.value = value
        self._topic = topic
        self._limit = limit
        self._answer: str | None = None

    def reply(self, value: Any, /) -> None:
        """Answer it. Whoever asked gets the answer when the block has ended; it is sent once, whatever crashes.

        Raises:
            WrongPlace: It was answered already.
            SerializationError: JSON can't carry the value.
        """
        if self._answer is not None:
            raise WrongPlace(f"the question of topic {self._topic!r} was answered already; reply once")
        self._answer = dumped(value, f"the answer to topic {self._topic!r}", self._limit)


class _Answering(Generic[T]):
    def __init__(self, context: Context, topic: str, type: TypeForm[T]) -> None:
        self._context = context
        self._topic = topic
        self._type = type
        self._id: UUID | None = None
        self._question: Question[T]

    async def __aenter__(self) -> Question[T]:
        payload, self._id = await self._context.question(self._topic)
        try:
            value = cast("T", shape(self._type).load(payload))
        except ValueError as error:
            failure = SerializationError(f"a question of topic {self._topic!r}", "what was asked", str(error))
            await self._answer(None, failure)
            raise failure from error
        self._question = Question(value, self._topic, self._context.max_payload)
        return self._question

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RunEnded | GeneratorExit):
            return  # this run of it is over, and another one will come by here
        await self._answer(self._question._answer, error)

    async def _answer(self, answer: str | None, error: BaseException | None) -> None:
        if answer is not None:
            payload = f'{{"value":{answer}}}'
        else:
            payload = f'{{"error":{failures.record(error or Unanswered(self._topic))}}}'
        await self._context.answer(self._id, payload)


def answering(topic: str, /, *, type: TypeForm[T] = ANY) -> AbstractAsyncContextManager[Question[T]]:
    """Wait for a question (`handle.ask`), and answer it: `async with answering("price") as question: ...`.

    Whoever asked gets what the block gave to `question.reply`, when the block has ended. A block that ends without a
    reply answers with the error that ended it, or with `Unanswered`. A plain message of the topic is taken, too; the
    answer to it goes nowhere.

    Args:
        topic: What the question is about.
        type: What its value is.
    """
    return _Answering(required("answering()"), check_name("topic", topic), type)


# Once: the answer has an id, which the question gives it. By name: an error's text isn't the same twice.
@step(name="reply()", idempotent=True, retry=FOR_EVER, match="name")
async def REPLY(question: str, payload: str) -> None:  # noqa: N802 - a step, which is a value
    """What the end of an `answering` block is; without a question it was a plain message, and nobody waits."""
    if question:
        await required("reply()").answer(UUID(question), payload)
