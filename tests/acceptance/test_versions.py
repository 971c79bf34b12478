"""Versions of the code: what is recorded, who takes what, and the two paths of `patched`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import timedelta
from types import ModuleType
from typing import Any

import pytest

from acceptance.support import AT_ONCE, SOON, Gate, hold, served
from perdure import App, Client, Handle, Invocation, ReplayMismatch, Retry, RetryAfter, Status, patched, sleep, step
from perdure.telemetry import StepRetries, StepsUnasked, UnknownNames, WorkflowSuspended

HOUR = timedelta(hours=1)
Sql = Callable[..., list[Any]]
Code = Callable[[], Any]


class Shop:
    """Steps that write down that they ran, whichever version of the code calls them."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.errors: list[Exception] = []

    @step
    async def charge(self) -> str:
        self.did.append("charge")
        return "charged"

    @step
    async def insure(self) -> str:
        self.did.append("insure")
        return "insured"

    @step(retry=Retry(max_attempts=3, initial=HOUR, maximum=HOUR, jitter=0.0))
    async def ship(self) -> str:
        self.did.append("ship")
        if self.errors:
            raise self.errors.pop(0)
        return "shipped"


@pytest.fixture
def shop() -> Shop:
    return Shop()


@pytest.fixture
async def release(database_url: str, schema: str) -> AsyncIterator[Callable[..., App]]:
    """A version of the app: `release("1", flow)`, where `flow` is that version's code of the workflow `flow`."""
    async with AsyncExitStack() as stack:
        apps: list[App] = []

        def make(version: str, code: Code) -> App:
            app = App("shop", database_url=database_url, schema=schema, version=version)
            app.workflow(name="flow")(code)
            stack.push_async_callback(app.close)
            apps.append(app)
            return app

        yield make


def started(handle: Handle[Any], app: App) -> Handle[Any]:
    """The same workflow, as another version's app sees it."""
    return app.handle(handle.id)


async def suspended(app: App, events: Any) -> Handle[Any]:
    """Start `flow` on this version, and let it leave memory; its worker is gone."""
    async with app.worker():
        handle = await app.start(Invocation("flow"))
        await events.wait_for(WorkflowSuspended)
    return handle


# --- what is recorded ------------------------------------------------------------------------------------------------


async def test_each_checkpoint_has_the_version_that_recorded_it(
    release: Callable[..., App], shop: Shop, sql: Sql
) -> None:
    gate = Gate()

    async def flow() -> list[str]:
        first = await shop.charge()
        await hold(gate)
        return [first, await shop.ship()]

    old, new = release("1", flow), release("2", flow)
    async with old.worker(grace=AT_ONCE):
        handle = await old.start(Invocation("flow"))
        await gate.reached()
    gate.open()
    assert await served(new, started(handle, new)) == ["charged", "shipped"]
    assert sql("SELECT name, version FROM workflow_steps ORDER BY position") == [
        ("charge", "1"),
        ("hold", "2"),
        ("ship", "2"),
    ]
    assert sql("SELECT version FROM checkpoints WHERE key = '$result'") == [("2",)]
    assert (await handle.describe()).version == "1", "it belongs to the version that it began under"


async def test_what_a_client_without_code_starts_belongs_to_the_version_that_takes_it_first(
    release: Callable[..., App], shop: Shop, database_url: str, schema: str, sql: Sql
) -> None:
    gate = Gate()

    async def flow() -> None:
        await hold(gate)

    app = release("7", flow)
    async with Client(database_url, schema=schema) as client, app.worker(grace=AT_ONCE):
        await client.start(Invocation("flow"))
        await gate.reached()
        assert sql("SELECT version, running FROM versions") == [("7", 1)]


def module(**functions: Any) -> ModuleType:
    """A module with these in it."""
    made = ModuleType("code_of_a_version")
    vars(made).update(functions)
    return made


def app_with(value: int) -> App:
    code = f"from perdure import step, workflow\n@step\nasync def work(): return {value}\n"
    code += "@workflow\nasync def flow(): return await work()\n"
    made = module(__name__=f"code_of_version_{value}")
    exec(code, vars(made))
    return App("shop", include=[made])


def test_the_default_version_is_the_code() -> None:
    assert app_with(1).version == app_with(1).version
    assert app_with(1).version != app_with(2).version


# --- who takes what --------------------------------------------------------------------------------------------------


async def test_any_version_takes_workflows_of_any_other(release: Callable[..., App], shop: Shop) -> None:
    async def flow() -> str:
        return await shop.charge()

    old, new = release("1", flow), release("2", flow)
    assert await served(new, await old.start(Invocation("flow"))) == "charged"
    assert await served(old, await new.start(Invocation("flow"))) == "charged"


async def test_a_pinned_worker_leaves_workflows_of_other_versions_alone(
    release: Callable[..., App], shop: Shop
) -> None:
    async def flow() -> str:
        return await shop.charge()

    old, new = release("1", flow), release("2", flow)
    theirs = await old.start(Invocation("flow"))
    async with new.worker(only_version=True):
        # Later in the queue, so what is claimed would have been claimed before it.
        assert await new.run(Invocation("flow")) == "charged"
        assert await theirs.status() is Status.PENDING
        async with old.worker(only_version=True):
            assert await theirs.result(timeout=SOON) == "charged"


async def test_a_pinned_worker_takes_what_has_no_version_yet(
    release: Callable[..., App], shop: Shop, database_url: str, schema: str
) -> None:
    async def flow() -> str:
        return await shop.charge()

    async with Client(database_url, schema=schema) as client:
        handle = await client.start(Invocation("flow"))
        async with release("2", flow).worker(only_version=True):
            assert await handle.result(timeout=SOON) == "charged"


async def test_what_a_pinned_worker_began_stays_with_its_version_while_it_sleeps(
    release: Callable[..., App], shop: Shop, events: Any, clock: Any
) -> None:
    async def flow() -> str:
        await sleep(HOUR)
        return await shop.charge()

    old, new = release("1", flow), release("2", flow)
    handle = await suspended(old, events)
    clock.advance(3601)
    async with new.worker(only_version=True):
        assert await new.start(Invocation("flow"))
        await events.wait_for(WorkflowSuspended, lambda event: event.workflow_id != handle.id)
        assert await handle.status() in (Status.WAITING, Status.PENDING)
        assert shop.did == []
    assert await served(old, handle) == "charged"


async def test_a_pinned_worker_takes_the_version_that_a_workflow_names_itself(
    database_url: str, schema: str, shop: Shop
) -> None:
    async def flow() -> str:
        return await shop.charge()

    async with (
        App("shop", database_url=database_url, schema=schema, version="1") as old,
        App("shop", database_url=database_url, schema=schema, version="2") as new,
    ):
        declared = old.workflow(version="stable")(flow)
        new.workflow(version="stable")(flow)
        handle = await old.start(declared())
        async with new.worker(only_version=True):
            assert await handle.result(timeout=SOON) == "charged"


async def test_the_view_shows_what_is_unfinished_by_version_and_how_many_workers_take_it(
    release: Callable[..., App], shop: Shop, sql: Sql, events: Any
) -> None:
    gate = Gate()

    async def flow(where: str = "waiting") -> None:
        if where == "running":
            await hold(gate)
        await sleep(HOUR)

    def shown() -> list[Any]:
        return sql("SELECT version, pending, running, waiting, workers FROM versions ORDER BY version")

    old, new = release("1", flow), release("2", flow)
    await suspended(old, events)
    await old.start(Invocation("flow"), queue="nobody's")
    assert shown() == [("1", 1, 0, 1, 0)]
    async with new.worker(only_version=True, queues=["default"]):
        await new.start(Invocation("flow", "running"))
        await gate.reached()
        assert shown() == [("1", 1, 0, 1, 0), ("2", 0, 1, 0, 1)]
        async with old.worker(queues=["default"]):
            assert shown() == [("1", 1, 0, 1, 1), ("2", 0, 1, 0, 2)]
        gate.open()
        await events.wait_for(WorkflowSuspended, lambda event: event.name == "flow")


# --- two paths -------------------------------------------------------------------------------------------------------


def versions_of(shop: Shop, gate: Gate, *, where: str) -> tuple[Code, Code]:
    """Two versions of a workflow: the new one insures behind `patched`; `where` the workflow stands meanwhile."""

    async def stand() -> None:
        if where == "body":
            await hold(gate)
        elif where == "sleep":
            await sleep(HOUR)
        else:
            await shop.ship()

    async def old() -> list[str]:
        done = [await shop.charge()]
        await stand()
        return done

    async def new() -> list[str]:
        done = [await shop.charge()]
        if patched("insurance"):
            done.append(await shop.insure())
        await stand()
        return done

    return old, new


async def test_a_workflow_that_starts_on_new_code_takes_the_new_path(release: Callable[..., App], shop: Shop) -> None:
    gate = Gate()
    gate.open()
    _, new = versions_of(shop, gate, where="body")
    app = release("2", new)
    async with app.worker():
        assert await app.run(Invocation("flow")) == ["charged", "insured"]


async def test_what_passed_the_change_on_old_code_takes_the_old_path(release: Callable[..., App], shop: Shop) -> None:
    gate, late = Gate(), Gate()

    async def old() -> list[str]:
        done = [await shop.charge()]
        await shop.ship()
        await hold(gate)
        return done

    async def new() -> list[str]:
        done = [await shop.charge()]
        if patched("insurance"):
            done.append(await shop.insure())
        await shop.ship()
        await hold(gate)
        if patched("another"):
            done.append("another")
        if patched("insurance"):
            done.append("the same answer everywhere")
        await hold(late)
        return done

    old_app, new_app = release("1", old), release("2", new)
    async with old_app.worker(grace=AT_ONCE):
        handle = await old_app.start(Invocation("flow"))
        await gate.reached()
    gate.open()
    async with new_app.worker(grace=AT_ONCE):
        await late.reached()
    late.open()
    # What it hadn't reached before takes the new path; and replays of all that are the same.
    assert await served(new_app, started(handle, new_app)) == ["charged", "another"]
    assert shop.did == ["charge", "ship"]


async def test_what_had_not_come_so_far_takes_the_new_path(release: Callable[..., App], shop: Shop) -> None:
    gate = Gate()

    async def old() -> str:
        await hold(gate)
        return "old"

    async def new() -> str:
        await hold(gate)
        return await shop.insure() if patched("insurance") else "old"

    old_app, new_app = release("1", old), release("2", new)
    async with old_app.worker(grace=AT_ONCE):
        handle = await old_app.start(Invocation("flow"))
        await gate.reached()
    gate.open()
    assert await served(new_app, started(handle, new_app)) == "insured"


async def test_what_sleeps_behind_the_change_takes_the_old_path(
    release: Callable[..., App], shop: Shop, events: Any, clock: Any
) -> None:
    """Nothing is recorded behind the change but that a sleep began: that is enough."""
    old, new = (
        release(version, code) for version, code in zip("12", versions_of(shop, Gate(), where="sleep"), strict=True)
    )
    handle = await suspended(old, events)
    clock.advance(3601)
    assert await served(new, started(handle, new)) == ["charged"]
    assert shop.did == ["charge"]


@pytest.mark.parametrize(
    "error", [ConnectionError("no truck"), RetryAfter(HOUR, counts=False)], ids=["after a failure", "between polls"]
)
async def test_what_pauses_between_attempts_behind_the_change_takes_the_old_path(
    release: Callable[..., App], shop: Shop, events: Any, clock: Any, error: Exception
) -> None:
    shop.errors = [error, error]
    old, new = (
        release(version, code) for version, code in zip("12", versions_of(shop, Gate(), where="ship"), strict=True)
    )
    handle = await suspended(old, events)
    clock.advance(3601)
    async with new.worker(grace=AT_ONCE):  # once more on new code: what that records doesn't change the answer
        await events.wait_for(StepRetries, lambda _: shop.did.count("ship") == 2)
        await events.wait_for(WorkflowSuspended, lambda _: len(events.of(WorkflowSuspended)) == 2)
    clock.advance(3601)
    assert await served(new, started(handle, new)) == ["charged"]
    assert shop.did == ["charge", "ship", "ship", "ship"]


async def test_what_sleeps_before_the_change_takes_the_new_path(
    release: Callable[..., App], shop: Shop, events: Any, clock: Any
) -> None:
    async def old() -> str:
        await shop.charge()
        await sleep(HOUR)
        return "old"

    async def new() -> str:
        await shop.charge()
        await sleep(HOUR)
        return await shop.insure() if patched("insurance") else "old"

    old_app, new_app = release("1", old), release("2", new)
    handle = await suspended(old_app, events)
    clock.advance(3601)
    assert await served(new_app, started(handle, new_app)) == "insured"


@pytest.mark.parametrize("where", ["sleep", "ship"])
async def test_what_took_the_new_path_takes_it_again_after_a_crash_behind_it(
    release: Callable[..., App], shop: Shop, events: Any, clock: Any, where: str
) -> None:
    shop.errors = [ConnectionError("no truck")]
    _, new = versions_of(shop, Gate(), where=where)
    app, again = release("2", new), release("3", new)
    handle = await suspended(app, events)
    clock.advance(3601)
    assert await served(again, started(handle, again)) == ["charged", "insured"]
    assert shop.did.count("insure") == 1


async def test_a_crash_right_behind_the_answer_does_not_change_it(release: Callable[..., App], shop: Shop) -> None:
    """Asked first of all, with nothing recorded before it, and nothing behind it but a body that was cut short."""
    gate = Gate()

    async def new() -> list[str]:
        if not patched("insurance"):
            return ["the old path"]
        await hold(gate)
        return ["the new path"]

    app = release("2", new)
    async with app.worker(grace=AT_ONCE):
        handle = await app.start(Invocation("flow"))
        await gate.reached()
    gate.open()
    assert await served(app, handle) == ["the new path"]


async def test_new_workflows_may_be_taken_over_by_old_code_and_back(
    release: Callable[..., App], shop: Shop, events: Any
) -> None:
    """In a rolling deploy both run side by side: a step that old code doesn't know is reported, not asked for."""
    gate, second = Gate(), Gate()

    async def old() -> list[str]:
        done = [await shop.charge()]
        await hold(gate)
        done.append(await shop.ship())
        await hold(second)
        return done

    async def new() -> list[str]:
        done = [await shop.charge()]
        if patched("insurance"):
            done.append(await shop.insure())
        await hold(gate)
        done.append(await shop.ship())
        await hold(second)
        return done

    old_app, new_app = release("1", old), release("2", new)
    async with new_app.worker(grace=AT_ONCE):
        handle = await new_app.start(Invocation("flow"))
        await gate.reached()
    gate.open()
    async with old_app.worker(grace=AT_ONCE):
        await second.reached()
    second.open()
    assert await served(new_app, started(handle, new_app)) == ["charged", "insured", "shipped"]
    assert shop.did == ["charge", "insure", "ship"]
    assert events.of(StepsUnasked) == []
    assert events.of(UnknownNames) == []


async def test_what_old_code_leaves_unasked_is_reported_at_its_end(
    release: Callable[..., App], shop: Shop, events: Any
) -> None:
    gate = Gate()
    old, new = versions_of(shop, gate, where="body")
    old_app, new_app = release("1", old), release("2", new)
    async with new_app.worker(grace=AT_ONCE):
        handle = await new_app.start(Invocation("flow"))
        await gate.reached()
    gate.open()
    assert await served(old_app, started(handle, old_app)) == ["charged"]
    (unasked,) = events.of(StepsUnasked)
    assert set(unasked.keys) == {"insure", "patched(insurance)"}


async def test_a_step_whose_function_is_renamed_keeps_its_outcome_under_its_name(
    release: Callable[..., App], shop: Shop
) -> None:
    gate = Gate()

    @step(name="charge")
    async def take_the_money() -> str:
        shop.did.append("charged again")
        return "charged again"

    async def old() -> str:
        value = await shop.charge()
        await hold(gate)
        return value

    async def new() -> str:
        value = await take_the_money()
        await hold(gate)
        return value

    old_app, new_app = release("1", old), release("2", new)
    async with old_app.worker(grace=AT_ONCE):
        handle = await old_app.start(Invocation("flow"))
        await gate.reached()
    gate.open()
    assert await served(new_app, started(handle, new_app)) == "charged"


@pytest.mark.parametrize("match", ["args", "name"])
async def test_other_arguments_are_a_mismatch_unless_only_the_name_counts(
    release: Callable[..., App], match: Any
) -> None:
    gate = Gate()

    @step(match=match)
    async def pay(cents: int) -> int:
        return cents

    def code(cents: int) -> Code:
        async def flow() -> int:
            paid = await pay(cents)
            await hold(gate)
            return paid

        return flow

    old, new = release("1", code(100)), release("2", code(200))
    async with old.worker(grace=AT_ONCE):
        handle = await old.start(Invocation("flow"))
        await gate.reached()
    gate.open()
    if match == "name":
        assert await served(new, started(handle, new)) == 100
        return
    with pytest.raises(ReplayMismatch, match="version 1") as caught:
        await served(new, started(handle, new))
    assert (caught.value.recorded_version, caught.value.version) == ("1", "2")
