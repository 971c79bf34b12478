"""A codec stands between payloads and the database."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from acceptance.support import SOON, Gate, hold, only_step, replayed, served
from perdure import App, Start, step
from perdure.telemetry import KeyAttached


class Base64:
    """A payload as a JSON string; what was written before it was put in is no string that begins so."""

    def encode(self, text: str) -> str:
        return json.dumps("b64:" + base64.b64encode(text.encode()).decode())

    def decode(self, text: str) -> str:
        value = json.loads(text)
        if isinstance(value, str) and value.startswith("b64:"):
            return base64.b64decode(value.removeprefix("b64:")).decode()
        return text


class Salted(Base64):
    """Codes the same text differently each time, as an encryption does."""

    def encode(self, text: str) -> str:
        return super().encode(os.urandom(8).hex() + text)

    def decode(self, text: str) -> str:
        return super().decode(text)[16:]


def is_coded(value: object) -> bool:
    return isinstance(value, str) and value.startswith("b64:")


@pytest.fixture
async def coded(database_url: str, schema: str) -> AsyncIterator[App]:
    async with App("coded", database_url=database_url, schema=schema, codec=Base64()) as app:
        yield app


@step
async def double(number: int) -> int:
    return 2 * number


async def test_inputs_outputs_and_results_are_stored_coded(coded: App, sql: Callable[..., list[Any]]) -> None:
    @coded.workflow
    async def flow(number: int) -> list[int]:
        return [await double(number)]

    async with coded.worker():
        assert await coded.run(flow(21)) == [42]
        assert await coded.run(flow(21), key="k") == [42]
    for row in [*sql("SELECT input, output FROM workflows"), *sql("SELECT output FROM workflow_steps")]:
        assert all(is_coded(value) for value in row)


async def test_starts_of_every_kind_are_coded(coded: App, sql: Callable[..., list[Any]]) -> None:
    @coded.workflow
    async def flow(number: int) -> None: ...

    await coded.start(flow(1))
    await coded.start(flow(2), key="k")
    await coded.start_many([flow(3), Start(flow(4), key="l")])
    inputs = [value for (value,) in sql("SELECT input FROM workflows")]
    assert len(inputs) == 4
    assert all(is_coded(value) for value in inputs)
    assert sorted([each.input["number"] async for each in coded.workflows()]) == [1, 2, 3, 4]


async def test_what_is_looked_at_is_decoded(coded: App) -> None:
    @coded.workflow
    async def flow(number: int) -> list[int]:
        return [await double(number)]

    handle = await coded.start(flow(21))
    assert await served(coded, handle) == [42]
    found = await handle.describe()
    assert (found.input, found.output) == ({"number": 21}, [42])
    assert (await only_step(handle)).output == 42
    assert [each.output async for each in coded.workflows()] == [[42]]


async def test_a_replay_decodes(coded: App) -> None:
    gate = Gate()

    @coded.workflow
    async def flow(number: int) -> int:
        doubled = await double(number)
        await hold(gate)
        return doubled

    assert await replayed(coded, flow(21), gate) == 42


async def test_errors_work_as_without(coded: App) -> None:
    @step
    async def failing() -> None:
        raise KeyError("secret")

    @coded.workflow
    async def flow() -> str:
        try:
            await failing()
        except KeyError as error:
            return repr(error)
        return ""

    async with coded.worker():
        assert await coded.run(flow()) == "KeyError('secret')"


async def test_rows_from_before_the_codec_can_be_read(app: App, coded: App) -> None:
    @app.workflow(name="flow")
    async def before(number: int) -> int:
        return number

    @coded.workflow(name="flow")
    async def after(number: int) -> int:
        return number

    old = await app.start(before(1))
    async with coded.worker():
        assert await coded.handle(old.id, int).result(timeout=SOON) == 1
        assert (await coded.handle(old.id).describe()).input == {"number": 1}
        assert await coded.run(after(2)) == 2


async def test_the_same_arguments_coded_differently_are_no_difference(
    database_url: str, schema: str, events: Any
) -> None:
    async with App("salted", database_url=database_url, schema=schema, codec=Salted()) as salted:

        @salted.workflow
        async def flow(number: int) -> int:
            return number

        first = await salted.start(flow(1), key="k")
        again = await salted.start(flow(1), key="k")
        assert again.id == first.id
        assert events.of(KeyAttached) == []
        await salted.start(flow(2), key="k")
        assert len(events.of(KeyAttached)) == 1
        assert await served(salted, first) == 1
