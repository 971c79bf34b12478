"""Declaring workflows: decorators, names, modules."""

from __future__ import annotations

import gc
import sys
import types
from pathlib import Path
from uuid import uuid4 as any_uuid

import pytest

from acceptance.support import SOON
from perdure import App, DuplicateName, Invocation, Step, Workflow, WrongPlace, step, workflow
from perdure.errors import InvalidArguments


def module_with(*functions: Workflow[..., object] | Step[..., object]) -> types.ModuleType:
    module = types.ModuleType(f"shop_{any_uuid().hex}")
    for number, function in enumerate(functions):
        setattr(module, f"function_{number}", function)
    return module


async def test_a_workflow_is_declared_with_the_bare_decorator(app: App) -> None:
    @app.workflow
    async def double(number: int) -> int:
        return 2 * number

    async with app.worker():
        assert await app.run(double(21)) == 42


async def test_a_workflow_is_declared_with_the_called_decorator(app: App) -> None:
    @app.workflow(name="twice", queue="sums")
    async def double(number: int) -> int:
        return 2 * number

    async with app.worker():
        handle = await app.start(double(21))
        assert await handle.result() == 42
    found = await handle.describe()
    assert (found.name, found.queue) == ("twice", "sums")


def test_the_undecorated_function_stays_within_reach(app: App) -> None:
    async def double(number: int) -> int:
        """Two times."""
        return 2 * number

    declared = app.workflow(double)
    assert declared.fn is double
    assert declared.name == "double"
    assert declared.__doc__ == "Two times."


async def test_a_workflow_takes_keyword_arguments_and_defaults(app: App) -> None:
    @app.workflow
    async def checkout(order_id: int, *parts: str, express: bool = False, **rest: int) -> list[object]:
        return [order_id, list(parts), express, rest]

    async with app.worker():
        assert await app.run(checkout(1)) == [1, [], False, {}]
        assert await app.run(checkout(1, "a", "b", express=True, more=3)) == [1, ["a", "b"], True, {"more": 3}]


def test_a_workflow_must_be_async(app: App) -> None:
    def double(number: int) -> int:
        return 2 * number

    with pytest.raises(TypeError, match="double"):
        app.workflow(double)  # type: ignore[type-var]


def test_a_generator_is_no_workflow(app: App) -> None:
    async def count():
        yield 1

    with pytest.raises(TypeError, match="count"):
        app.workflow(count)  # type: ignore[type-var]


def test_two_workflows_of_one_name_are_refused_at_once(app: App) -> None:
    @app.workflow
    async def checkout() -> None: ...

    with pytest.raises(DuplicateName, match=r"checkout.*name="):

        @app.workflow(name="checkout")
        async def other() -> None: ...


def test_a_workflow_and_a_job_of_one_name_are_refused_at_once(app: App) -> None:
    @app.workflow
    async def checkout() -> None: ...

    with pytest.raises(DuplicateName):

        @app.job(name="checkout")
        def other() -> None: ...


async def test_two_steps_of_one_name_are_refused_when_a_worker_starts(database_url: str, schema: str) -> None:
    @step(name="charge")
    async def one() -> None: ...

    @step(name="charge")
    async def other() -> None: ...

    async with App(include=[module_with(one, other)], database_url=database_url, schema=schema) as app:
        with pytest.raises(DuplicateName, match=r"step.*charge"):
            async with app.worker():
                pass


async def test_one_step_in_two_modules_is_one_step(database_url: str, schema: str) -> None:
    @step
    async def charge() -> str:
        return "paid"

    @workflow
    async def checkout() -> str:
        return await charge()

    modules = [module_with(charge, checkout), module_with(charge)]
    async with App(include=modules, database_url=database_url, schema=schema) as app, app.worker():
        assert await app.run(checkout()) == "paid"


async def test_a_module_is_included_by_its_name_and_imported_when_it_is_needed(
    database_url: str, schema: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"orders_{any_uuid().hex}"
    (tmp_path / f"{name}.py").write_text(
        "from perdure import workflow\n\n@workflow\nasync def greet(name: str) -> str:\n    return f'hello {name}'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    async with App(include=[name], database_url=database_url, schema=schema) as app:
        assert name not in sys.modules
        async with app.worker():
            assert await app.run(Invocation("greet", "you")) == "hello you"
    monkeypatch.delitem(sys.modules, name)


async def test_modules_and_workflows_are_included_as_objects(database_url: str, schema: str) -> None:
    @workflow
    async def one() -> int:
        return 1

    @workflow
    async def two() -> int:
        return 2

    async with App(include=[module_with(one), two], database_url=database_url, schema=schema) as app, app.worker():
        assert await app.run(one()) + await app.run(two()) == 3


async def test_two_included_workflows_of_one_name_are_refused_at_first_use(database_url: str, schema: str) -> None:
    @workflow(name="checkout")
    async def one() -> None: ...

    @workflow(name="checkout")
    async def other() -> None: ...

    async with App(include=[module_with(one), other], database_url=database_url, schema=schema) as app:
        with pytest.raises(DuplicateName, match="checkout"):
            async with app.worker():
                pass


async def test_a_module_that_is_missing_is_an_error_that_names_it(database_url: str, schema: str) -> None:
    async with App(include=["no.such.module"], database_url=database_url, schema=schema) as app:
        with pytest.raises(ModuleNotFoundError, match="no"):
            async with app.worker():
                pass


def test_an_invocation_that_nobody_uses_warns(app: App) -> None:
    @app.workflow
    async def checkout(order_id: int) -> None: ...

    with pytest.warns(RuntimeWarning, match=r"checkout.*never started.*app\.start"):
        checkout(42)


async def test_an_invocation_that_a_verb_got_does_not_warn(app: App) -> None:
    @app.workflow
    async def checkout(order_id: int) -> None: ...

    await app.start(checkout(42))
    with pytest.raises(InvalidArguments):
        await app.start(checkout("42"))  # type: ignore[arg-type]
    gc.collect()


async def test_an_invocation_awaited_outside_a_workflow_says_what_to_do(app: App) -> None:
    @app.workflow
    async def checkout() -> None: ...

    with pytest.raises(WrongPlace, match=r"checkout.*app\.run"):
        await checkout()


async def test_a_verb_refuses_what_is_no_invocation(app: App) -> None:
    @app.workflow
    async def checkout() -> None: ...

    with pytest.raises(WrongPlace, match="invocation"):
        await app.start(checkout)  # type: ignore[arg-type]


async def test_a_workflow_without_steps_ends_as_any_other(app: App) -> None:
    @app.workflow
    async def nothing() -> None: ...

    async with app.worker():
        handle = await app.start(nothing())
        assert await handle.result(timeout=SOON) is None
    assert await handle.steps() == []


async def test_parameters_may_be_named_as_options_are(app: App) -> None:
    @app.workflow
    async def flow(key: str, name: str, queue: int, timeout: int, args: list[int], kwargs: int) -> list[object]:
        return [key, name, queue, timeout, args, kwargs]

    async with app.worker():
        handle = await app.start(flow(key="a", name="b", queue=1, timeout=2, args=[3], kwargs=4), key="k", queue="q")
        assert await handle.result() == ["a", "b", 1, 2, [3], 4]
        by_name = Invocation("flow", key="a", name="b", queue=1, timeout=2, args=[3], kwargs=4)
        assert await app.run(by_name) == ["a", "b", 1, 2, [3], 4]


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 1000, "\ud800"])
def test_what_can_be_no_name_is_refused_at_the_decorator(app: App, name: str) -> None:
    async def checkout() -> None: ...

    with pytest.raises(ValueError, match="name"):
        app.workflow(name=name or "\0")(checkout)
    with pytest.raises(ValueError, match="name"):
        step(name=name or "\0")(checkout)
