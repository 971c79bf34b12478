"""Payloads: values come back as what they were, on the first run too, or are refused before anything is written."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import pytest
from pydantic import BaseModel
from typing_extensions import TypedDict

from acceptance.support import SOON, Gate, all_workflows, hold, only_step, replayed, served
from perdure import App, Client, InvalidArguments, Invocation, SerializationError, Status, step


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Line:
    item: str
    price: Decimal


@dataclass
class Order:
    id: UUID
    at: datetime
    lines: list[Line]
    colours: set[Colour] = field(default_factory=set)


@dataclass
class Rush(Order):
    until: date | None = None


class Card(BaseModel):
    number: str
    valid: tuple[int, int]


class Gold(Card):
    limit: int = 0


class Address(TypedDict):
    street: str
    zip: int


ORDER = Order(UUID(int=7), datetime(2024, 5, 1, tzinfo=UTC), [Line("chair", Decimal("9.90"))], {Colour.RED})


async def test_arguments_and_results_come_back_as_what_they_were(app: App) -> None:
    @app.workflow
    async def echo(
        order: Order,
        card: Card,
        address: Address,
        raw: bytes,
        pause: timedelta,
        pair: tuple[int, str],
        either: int | str | None,
        by_id: dict[UUID, date],
    ) -> tuple[Order, Card, Address, bytes, timedelta, tuple[int, str], int | str | None, dict[UUID, date]]:
        return order, card, address, raw, pause, pair, either, by_id

    given = (
        ORDER,
        Card(number="4242", valid=(12, 2030)),
        Address(street="Main", zip=12345),
        b"\x00\xff",
        timedelta(days=1, microseconds=3),
        (1, "a"),
        None,
        {UUID(int=1): date(2024, 1, 2)},
    )
    async with app.worker():
        assert await app.run(echo(*given)) == given


@pytest.mark.parametrize("value", [None, True, 0, -(2**60), 1.5, 1e300, "", "ü\n\t☃ 𝄞", [], {}, [1, [2, {"a": None}]]])
async def test_plain_json_needs_no_annotation(app: App, value: Any) -> None:
    @app.workflow
    async def echo(value):
        return value

    async with app.worker():
        result = await app.run(echo(value))
    assert result == value
    assert type(result) is type(value)


async def test_the_first_run_sees_the_decoded_value(app: App) -> None:
    kept: list[list[int]] = []

    @step
    async def numbers() -> list[int]:
        kept.append([1, 2])
        return kept[0]

    @app.workflow
    async def flow() -> list[int]:
        got = await numbers()
        kept[0].append(3)  # as a step does that goes on filling what it returned
        return got

    async with app.worker():
        assert await app.run(flow()) == [1, 2]


async def test_the_first_run_and_a_replay_see_values_of_the_same_types(app: App) -> None:
    gate = Gate()
    seen: list[Order] = []

    @step
    async def load() -> Order:
        return ORDER

    @app.workflow
    async def flow() -> None:
        seen.append(await load())
        await hold(gate)

    await replayed(app, flow(), gate)
    assert seen == [ORDER, ORDER]
    assert all(value is not ORDER for value in seen)


CANT_BE_CARRIED: dict[str, tuple[Any, Callable[[], Any], str]] = {
    "nan": (float, lambda: math.nan, "float"),
    "infinity": (Any, lambda: [math.inf], "float|list"),
    "nul": (str, lambda: "a\0b", "str"),
    "nul inside": (Any, lambda: {"a": ["\0"]}, "dict|str"),
    "lone surrogate": (str, lambda: "\ud800", "str"),
    "set without annotation": (Any, lambda: {1}, "set"),
    "tuple without annotation": (Any, lambda: (1, 2), "tuple"),
    "keys that are no text": (Any, lambda: {1: 2}, "dict|int"),
    "object": (Any, threading.Lock, "lock"),
    "datetime without annotation": (Any, lambda: datetime(2024, 1, 1, tzinfo=UTC), "datetime"),
    "fields of a subclass": (
        Order,
        lambda: Rush(ORDER.id, ORDER.at, [], set(), date(2024, 1, 1)),
        "Rush",
    ),
    "fields of a model's subclass": (Card, lambda: Gold(number="1", valid=(1, 2), limit=3), "Gold"),
    "fields of a subclass inside": (
        list[Card],
        lambda: [Gold(number="1", valid=(1, 2), limit=3)],
        "Gold|list",
    ),
    "too large": (str, lambda: "x" * (17 * 1024 * 1024), "str"),
}
cases = pytest.mark.parametrize(
    ("annotation", "make", "type_name"), CANT_BE_CARRIED.values(), ids=CANT_BE_CARRIED.keys()
)


@cases
async def test_the_result_of_a_step_that_cannot_be_stored_is_refused(
    app: App, annotation: Any, make: Callable[[], Any], type_name: str
) -> None:
    async def load():
        return make()

    load.__annotations__["return"] = annotation
    stepped = step(load)

    @app.workflow
    async def flow() -> None:
        await stepped()

    handle = await app.start(flow())
    with pytest.raises(SerializationError, match=f"(?s)step 'load'.*({type_name})") as caught:
        await served(app, handle)
    assert len(str(caught.value)) < 2000
    assert (await only_step(handle)).status == "error"


@cases
async def test_the_result_of_a_workflow_that_cannot_be_stored_is_refused(
    app: App, annotation: Any, make: Callable[[], Any], type_name: str
) -> None:
    async def flow():
        return make()

    flow.__annotations__["return"] = annotation
    declared = app.workflow(flow)
    handle = await app.start(declared())
    with pytest.raises(SerializationError, match=f"(?s)workflow 'flow'.*({type_name})"):
        await served(app, handle)
    assert await handle.status() is Status.ERROR


@cases
async def test_an_argument_that_cannot_be_stored_is_refused_and_nothing_is_written(
    app: App, annotation: Any, make: Callable[[], Any], type_name: str
) -> None:
    async def flow(good: int, bad) -> None: ...

    flow.__annotations__["bad"] = annotation
    declared = app.workflow(flow)
    with pytest.raises((SerializationError, InvalidArguments), match=r"(?s)'?flow'?") as caught:
        await app.start(declared(1, make()))
    if type_name not in {"Rush", "Gold", "Gold|list"}:
        assert isinstance(caught.value, SerializationError)
    assert await all_workflows(app) == []


async def test_one_bad_start_among_many_writes_nothing_at_all(app: App) -> None:
    @app.workflow
    async def flow(value: float) -> None: ...

    with pytest.raises(SerializationError, match="flow"):
        await app.start_many([flow(1.0), flow(math.nan), flow(2.0)])
    assert await all_workflows(app) == []


async def test_a_refused_result_is_caught_by_the_workflow_on_both_runs(app: App) -> None:
    gate = Gate()
    seen: list[str] = []

    @step
    async def load() -> Any:
        return {1, 2}

    @app.workflow
    async def flow() -> None:
        try:
            await load()
        except SerializationError as error:
            seen.append(str(error))
        await hold(gate)

    await replayed(app, flow(), gate)
    assert len(seen) == 2
    assert seen[0] == seen[1]
    assert "'load'" in seen[0]
    assert "annotate" in seen[0]


async def test_attributes_that_cannot_be_stored_are_refused(app: App) -> None:
    @app.workflow
    async def flow() -> None: ...

    with pytest.raises(SerializationError, match="attributes"):
        await app.start(flow(), attributes={"a": {1}})
    assert await all_workflows(app) == []


@pytest.mark.parametrize(
    ("args", "kwargs", "what"),
    [
        ((), {}, "order_id"),
        ((1, 2), {}, "positional"),
        ((1,), {"wrong": 2}, "wrong"),
        ((1,), {"order_id": 2}, "order_id"),
    ],
    ids=["missing", "too many", "unknown", "twice"],
)
def test_wrong_arguments_are_refused_at_the_call(app: App, args: Any, kwargs: Any, what: str) -> None:
    @app.workflow
    async def checkout(order_id: int, *, express: bool = False) -> None: ...

    with pytest.raises(InvalidArguments, match=f"checkout.*{what}"):
        checkout(*args, **kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs", "what"),
    [
        (("42",), {}, "order_id"),
        ((None,), {}, "order_id"),
        ((True,), {}, "order_id"),
        ((1,), {"express": 1}, "express"),
    ],
)
async def test_arguments_of_wrong_types_are_refused_at_the_start(app: App, args: Any, kwargs: Any, what: str) -> None:
    @app.workflow
    async def checkout(order_id: int, *, express: bool = False) -> None: ...

    with pytest.raises(InvalidArguments, match=f"checkout.*{what}"):
        await app.start(checkout(*args, **kwargs))
    assert await all_workflows(app) == []


@pytest.mark.parametrize(
    "invocation",
    [
        lambda: Invocation("checkout", "no number", "2024-01-01T00:00:00Z"),
        lambda: Invocation("checkout"),
        lambda: Invocation("checkout", 1, "2024-01-01T00:00:00Z", 3),
        lambda: Invocation("checkout", 1, "2024-01-01T00:00:00Z", unknown=3),
        lambda: Invocation("checkout", 1, "yesterday"),
    ],
    ids=["type", "missing", "too many", "unknown", "text"],
)
async def test_what_nobody_could_validate_ends_in_error_without_running(
    app: App, database_url: str, schema: str, invocation: Callable[[], Invocation[Any]]
) -> None:
    ran: list[int] = []

    @app.workflow
    async def checkout(order_id: int, at: datetime) -> None:
        ran.append(order_id)

    async with Client(database_url, schema=schema) as client:
        started = await client.start(invocation())
        async with app.worker():
            with pytest.raises(InvalidArguments, match="checkout"):
                await started.result(timeout=SOON)
        assert await started.status() is Status.ERROR
        assert (await started.describe()).error["type"].endswith("InvalidArguments")
    assert ran == []


async def test_json_from_elsewhere_is_read_leniently(app: App, database_url: str, schema: str) -> None:
    @app.workflow
    async def checkout(order_id: int, at: datetime, order: Line) -> list[str]:
        return [type(order_id).__name__, at.isoformat(), type(order).__name__]

    async with Client(database_url, schema=schema) as client, app.worker():
        invocation = Invocation("checkout", 1, at="2024-01-01T00:00:00Z", order={"item": "chair", "price": "9.90"})
        assert await client.run(invocation) == ["int", "2024-01-01T00:00:00+00:00", "Line"]


async def test_payloads_can_be_read_in_sql(app: App, sql: Callable[..., list[tuple[object, ...]]]) -> None:
    @step
    async def load() -> Order:
        return ORDER

    @app.workflow
    async def flow(order: Order) -> Order:
        return await load()

    async with app.worker():
        await app.run(flow(ORDER))
    assert sql("SELECT output->'lines'->0->>'item', input->'order'->>'id', status FROM workflows") == [
        ("chair", str(ORDER.id), "success")
    ]
    assert sql("SELECT output->'lines'->0->>'price' FROM workflow_steps") == [("9.90",)]
