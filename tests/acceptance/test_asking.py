"""Questions that callers ask, and workflows answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest

from acceptance.support import AT_ONCE, SOON, Gate, hold, served
from perdure import (
    App,
    NotInWorkflow,
    Refused,
    SerializationError,
    Unanswered,
    WorkflowFailed,
    WorkflowNotFound,
    WrongPlace,
    WrongState,
    answering,
    recv,
    step,
)
from perdure.worker import WorkerOptions

Sql = Callable[..., list[Any]]
MOMENT = timedelta(milliseconds=50)


@dataclass
class Address:
    street: str
    city: str


class Strange(Exception):
    pass


def declare_cart(app: App, asked: list[object] | None = None) -> Any:
    """Takes so many questions about its address, and answers with the one before."""

    @app.workflow
    async def cart(questions: int) -> list[str]:
        address = Address("", "nowhere")
        for _ in range(questions):
            async with answering("address", type=Address) as question:
                if asked is not None:
                    asked.append(question.value)
                former, address = address, question.value
                question.reply(former)
        return [address.city]

    return cart


async def test_a_question_is_answered(app: App, sql: Sql) -> None:
    cart = declare_cart(app)
    async with app.worker():
        handle = await app.start(cart(2))
        assert await handle.ask("address", Address("High St", "York")) == {"street": "", "city": "nowhere"}
        answer = await handle.ask("address", Address("Low St", "Leeds"), type=Address, timeout=SOON)
        assert answer == Address("High St", "York")
        assert await handle.result(timeout=SOON) == ["Leeds"]
    assert [each.key for each in await handle.steps()] == [
        "recv(address)", "reply()", "recv(address)#2", "reply()#2"
    ]  # fmt: skip
    assert sql("SELECT count(*) FROM events") == [(0,)], "answers are nobody else's"


async def test_blocking_code_asks(app: App) -> None:
    cart = declare_cart(app)
    async with app.worker():
        handle = await app.start(cart(1))
        question = Address("High St", "York")
        answer = await asyncio.to_thread(lambda: app.blocking.handle(handle.id).ask("address", question, type=Address))
        assert answer.city == "nowhere"
    await asyncio.to_thread(app.blocking.close)


async def test_a_validator_refuses_before_the_code_sees_anything(app: App, sql: Sql) -> None:
    asked: list[object] = []
    cart = declare_cart(app, asked)

    @cart.validator("address")  # type: ignore[untyped-decorator]
    def check(address: Address) -> None:
        if address.city == "Atlantis":
            raise Refused("nobody delivers to Atlantis")
        if not address.street:
            raise ValueError("no street")

    async with app._worker(WorkerOptions(suspends_from=AT_ONCE)):
        handle = await app.start(cart(1))
        with pytest.raises(Refused, match="nobody delivers to Atlantis"):
            await handle.ask("address", Address("Wet St", "Atlantis"))
        with pytest.raises(Refused, match="no street"):
            await handle.ask("address", Address("", "York"))
        with pytest.raises(Refused, match="city"):
            await handle.ask("address", {"street": "High St"})
        assert await handle.ask("address", Address("High St", "York"), type=Address) == Address("", "nowhere")
        assert await handle.result(timeout=SOON) == ["York"]
    assert asked == [Address("High St", "York")]
    assert sql("SELECT count(*) FROM message_rows") == [(1,)]
    assert sql("SELECT count(*) FROM checkpoints WHERE kind = 'message'") == [(1,)]


async def test_a_plain_message_passes_by_the_validator_and_gets_no_answer(app: App) -> None:
    cart = declare_cart(app)

    @cart.validator("address")  # type: ignore[untyped-decorator]
    def check(address: Address) -> None:
        raise Refused("never")

    async with app.worker():
        handle = await app.start(cart(1))
        await handle.send("address", Address("High St", "York"))
        assert await handle.result(timeout=SOON) == ["York"]


async def test_a_block_that_fails_answers_with_its_error(app: App) -> None:
    @app.workflow
    async def flow() -> str:
        said: list[str] = []
        for error in (ValueError("no such seat"), Strange("odd"), None):
            try:
                async with answering("seat"):
                    if error is not None:
                        raise error
            except Exception as caught:
                said.append(type(caught).__name__)
        return " ".join(said)

    async with app.worker():
        handle = await app.start(flow())
        with pytest.raises(ValueError, match="no such seat"):
            await handle.ask("seat", 1)
        with pytest.raises(WorkflowFailed, match="odd"):
            await handle.ask("seat", 2)
        with pytest.raises(Unanswered, match="'seat'"):
            await handle.ask("seat", 3)
        assert await handle.result(timeout=SOON) == "ValueError Strange"


async def test_a_question_that_does_not_fit_is_answered_with_that(app: App) -> None:
    @app.workflow
    async def flow() -> int:
        try:
            async with answering("seat", type=int):
                pass
        except SerializationError:
            async with answering("seat", type=int) as question:
                question.reply(question.value)
                return question.value
        return 0

    async with app.worker():
        handle = await app.start(flow())
        with pytest.raises(SerializationError, match="seat"):
            await handle.ask("seat", "window")
        assert await handle.ask("seat", 7) == 7
        assert await handle.result(timeout=SOON) == 7


async def test_a_reply_is_given_once_and_once_only(app: App, sql: Sql) -> None:
    gate = Gate()
    twice: list[str] = []

    @app.workflow
    async def flow() -> None:
        async with answering("seat") as question:
            question.reply(1)
            try:
                question.reply(2)
            except WrongPlace as error:
                twice.append(str(error))
        await hold(gate)

    async with app.worker(grace=AT_ONCE):
        handle = await app.start(flow())
        assert await handle.ask("seat", None) == 1
        await gate.reached()
        assert "answered already" in twice[0]
    sql("DELETE FROM checkpoints WHERE key = 'reply()'")  # as if its worker had died before its flush
    gate.open()
    await served(app, handle)
    assert sql("SELECT count(*) FROM event_rows") == [(1,)]


async def test_what_nobody_answers(app: App) -> None:
    @app.workflow
    async def flow() -> None:
        await recv("end")

    async with app.worker():
        handle = await app.start(flow())
        with pytest.raises(TimeoutError):
            await handle.ask("seat", 1, timeout=MOMENT)
        asking = asyncio.create_task(handle.ask("seat", 2))
        await handle.send("end", None)
        with pytest.raises(WrongState, match="it has ended"):
            await asking
        with pytest.raises(WrongState, match="it has ended"):
            await handle.ask("seat", 3)
        with pytest.raises(WorkflowNotFound):
            await app.handle(uuid4()).ask("seat", 1)
        with pytest.raises(SerializationError, match="seat"):
            await handle.ask("seat", object())
        with pytest.raises(NotInWorkflow, match="answering"):
            answering("seat")

    @step
    async def answers() -> None:
        async with answering("seat"):
            pass

    @app.workflow
    async def wrong() -> None:
        await answers()

    async with app.worker():
        with pytest.raises(NotInWorkflow, match="in the workflow"):
            await app.run(wrong())


async def test_a_validator_that_waits_is_refused(app: App) -> None:
    cart = declare_cart(app)
    with pytest.raises(TypeError, match="must be a plain function"):

        @cart.validator("address")  # type: ignore[untyped-decorator]
        async def check(address: Address) -> None: ...
