"""Keys: starting is idempotent, for callers in one task, in many, and in several processes."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import pytest

from acceptance.support import Gate, all_workflows, hold, served
from perdure import App, Client, Invocation, KeyConflict, Start, Status
from perdure.telemetry import KeyAttached


async def test_a_second_start_attaches_to_the_first(app: App) -> None:
    @app.workflow
    async def checkout(order_id: int) -> int:
        return order_id

    first = await app.start(checkout(42), key="order-42")
    second = await app.start(checkout(42), key="order-42")
    assert first.id == second.id
    assert (first.started, second.started) == (True, False)
    assert first.key == second.key == "order-42"
    assert await served(app, second) == 42
    assert len(await all_workflows(app)) == 1


async def test_a_start_attaches_to_a_workflow_that_has_ended(app: App) -> None:
    @app.workflow
    async def checkout(order_id: int) -> int:
        return order_id

    first = await app.start(checkout(42), key="order-42")
    await served(app, first)
    again = await app.start(checkout(42), key="order-42")
    assert (again.id, again.started) == (first.id, False)
    assert await again.result() == 42


async def test_run_with_a_key_gives_the_result_of_the_first(app: App) -> None:
    calls: list[int] = []

    @app.workflow
    async def checkout(order_id: int) -> int:
        calls.append(order_id)
        return order_id

    async with app.worker():
        assert await app.run(checkout(42), key="k") == 42
        assert await app.run(checkout(42), key="k") == 42
    assert calls == [42]


async def test_other_arguments_under_the_same_key_are_reported(app: App, events: Any) -> None:
    @app.workflow
    async def checkout(order_id: int) -> int:
        return order_id

    first = await app.start(checkout(42), key="k")
    await app.start(checkout(42), key="k")
    assert events.of(KeyAttached) == []
    await app.start(checkout(43), key="k")
    (event,) = events.of(KeyAttached)
    assert (event.name, event.key, event.workflow_id) == ("checkout", "k", first.id)


async def test_other_arguments_in_a_batch_are_reported_too(app: App, events: Any) -> None:
    @app.workflow
    async def checkout(order_id: int) -> int:
        return order_id

    await app.start(checkout(1), key="k")
    await app.start_many([Start(checkout(1), key="k"), Start(checkout(2), key="other")])
    assert events.of(KeyAttached) == []
    await app.start_many([Start(checkout(3), key="k")])
    assert [event.key for event in events.of(KeyAttached)] == ["k"]


async def test_a_key_counts_for_workflows_of_one_name(app: App) -> None:
    one = await app.start(Invocation("one"), key="k")
    other = await app.start(Invocation("other"), key="k")
    assert one.id != other.id
    assert other.started


async def test_a_conflict_may_be_an_error(app: App) -> None:
    first = await app.start(Invocation("checkout"), key="k", on_conflict="raise")
    with pytest.raises(KeyConflict, match=r"'k'.*checkout") as caught:
        await app.start(Invocation("checkout"), key="k", on_conflict="raise")
    assert (caught.value.name, caught.value.key, caught.value.workflow_id) == ("checkout", "k", first.id)
    assert len(await all_workflows(app)) == 1


async def test_a_finished_workflow_may_be_replaced(app: App) -> None:
    @app.workflow
    async def checkout(order_id: int) -> int:
        return order_id

    first = await app.start(checkout(1), key="k")
    await served(app, first)
    second = await app.start(checkout(2), key="k", on_conflict="replace_finished")
    assert second.started
    assert second.id != first.id
    assert await served(app, second) == 2
    assert await first.result() == 1, "the old one keeps its row"
    assert (await first.describe()).key is None
    assert (await second.describe()).key == "k"
    found = await app.find(checkout, key="k")
    assert found is not None
    assert found.id == second.id


async def test_a_failed_workflow_may_be_replaced(app: App) -> None:
    @app.workflow
    async def checkout(order_id: int) -> int:
        if order_id == 1:
            raise KeyError
        return order_id

    first = await app.start(checkout(1), key="k")
    with pytest.raises(KeyError):
        await served(app, first)
    second = await app.start(checkout(2), key="k", on_conflict="replace_finished")
    assert await served(app, second) == 2


async def test_an_unfinished_workflow_is_not_replaced(app: App) -> None:
    gate = Gate()

    @app.workflow
    async def checkout() -> None:
        await hold(gate)

    first = await app.start(checkout(), key="k")
    pending = await app.start(checkout(), key="k", on_conflict="replace_finished")
    assert (pending.id, pending.started) == (first.id, False)
    async with app.worker():
        await gate.reached()
        running = await app.start(checkout(), key="k", on_conflict="replace_finished")
        assert (running.id, running.started) == (first.id, False)
        gate.open()
        await first.result()


async def test_replacing_where_there_is_nothing_is_a_start(app: App) -> None:
    handle = await app.start(Invocation("checkout"), key="k", on_conflict="replace_finished")
    assert handle.started


@pytest.mark.parametrize("conflict", ["attach", "replace_finished"])
async def test_one_key_from_many_tasks_is_one_workflow(app: App, conflict: Any) -> None:
    handles = await asyncio.gather(
        *(app.start(Invocation("checkout"), key="k", on_conflict=conflict) for _ in range(50))
    )
    assert len({handle.id for handle in handles}) == 1
    assert sum(handle.started for handle in handles) == 1
    assert len(await all_workflows(app)) == 1


async def test_one_key_from_many_tasks_conflicts_with_all_but_one(app: App) -> None:
    outcomes = await asyncio.gather(
        *(app.start(Invocation("checkout"), key="k", on_conflict="raise") for _ in range(20)), return_exceptions=True
    )
    assert sum(isinstance(outcome, KeyConflict) for outcome in outcomes) == 19
    assert len(await all_workflows(app)) == 1


async def test_a_finished_workflow_is_replaced_once_by_many(app: App) -> None:
    @app.workflow
    async def checkout() -> None: ...

    first = await app.start(checkout(), key="k")
    await served(app, first)
    handles = await asyncio.gather(*(app.start(checkout(), key="k", on_conflict="replace_finished") for _ in range(20)))
    assert len({handle.id for handle in handles}) == 1
    assert sum(handle.started for handle in handles) == 1
    assert handles[0].id != first.id
    assert len(await all_workflows(app)) == 2


async def test_one_key_from_several_clients_is_one_workflow(app: App, database_url: str, schema: str) -> None:
    await all_workflows(app)
    clients = [Client(database_url, schema=schema) for _ in range(4)]
    try:
        handles = await asyncio.gather(
            *(client.start(Invocation("checkout"), key=f"k{n}") for n in range(25) for client in clients)
        )
    finally:
        for client in clients:
            await client.close()
    assert len({handle.id for handle in handles}) == 25
    assert sum(handle.started for handle in handles) == 25


async def test_one_key_twice_in_one_batch_is_one_workflow(app: App) -> None:
    one, other, same = await app.start_many(
        [
            Start(Invocation("checkout"), key="k"),
            Start(Invocation("checkout"), key="l"),
            Start(Invocation("checkout"), key="k"),
        ]
    )
    assert one.id == same.id != other.id
    assert (one.started, same.started) == (True, False)


async def test_keys_may_be_any_text(app: App) -> None:
    for key in ("ü ☃ 𝄞", "%s", "'; DROP SCHEMA x; --", "x" * 1000, " ", "\\"):
        first = await app.start(Invocation("checkout"), key=key)
        again = await app.start(Invocation("checkout"), key=key)
        assert first.id == again.id
        assert (await first.describe()).key == key


START_AT_A_SIGN = """
import json, sys
from perdure import App, Invocation

app = App(database_url=sys.argv[1], schema=sys.argv[2])
app.blocking.find("checkout", key="none")
print("ready", flush=True)
sys.stdin.readline()
handles = [app.blocking.start(Invocation("checkout"), key=f"k{number}") for number in range(10)]
print(json.dumps([[str(handle.id), handle.started] for handle in handles]), flush=True)
"""


async def test_one_key_from_several_processes_is_one_workflow(app: App, database_url: str, schema: str) -> None:
    await all_workflows(app)
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", START_AT_A_SIGN, database_url, schema,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )
        for _ in range(3)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
    outputs = await asyncio.gather(*(process.communicate(b"go\n") for process in processes))
    answers = [json.loads(output) for output, _ in outputs]
    for number in range(10):
        assert len({answer[number][0] for answer in answers}) == 1
        assert sum(answer[number][1] for answer in answers) == 1
    found = await all_workflows(app)
    assert len(found) == 10
    assert {each.status for each in found} == {Status.PENDING}
