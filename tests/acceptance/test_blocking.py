"""`app.blocking`: the same verbs for code without an event loop."""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import re
import subprocess
import sys
import typing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4 as any_uuid

import psycopg
import pytest

from acceptance.support import SOON, Gate, hold
from perdure import (
    App,
    Handle,
    Invocation,
    KeyConflict,
    ResultTimeout,
    Start,
    Status,
    WorkflowNotFound,
    WrongPlace,
    step,
)
from perdure.blocking import BlockingApp, BlockingHandle


@pytest.fixture
def lone_app(database_url: str, schema: str) -> typing.Iterator[App]:
    """An app for tests without an event loop."""
    app = App("blocking", database_url=database_url, schema=schema)
    yield app
    app.blocking.close()


def test_a_script_starts_workflows_and_looks_at_them(lone_app: App) -> None:
    app = lone_app.blocking
    handle = app.start(
        Invocation("checkout", 42),
        key="order-42",
        queue="eu",
        priority=3,
        partition="p",
        attributes={"a": 1},
    )
    assert handle.started
    assert handle.key == "order-42"
    assert handle.status() is Status.PENDING
    found = handle.describe()
    assert (found.id, found.key, found.queue, found.priority, found.partition) == (
        handle.id,
        "order-42",
        "eu",
        3,
        "p",
    )
    assert handle.steps() == []
    assert not app.start(Invocation("checkout", 42), key="order-42").started
    with pytest.raises(KeyConflict):
        app.start(Invocation("checkout", 42), key="order-42", on_conflict="raise")
    by_key = app.find("checkout", key="order-42")
    assert by_key is not None
    assert by_key.id == handle.id
    assert app.find("checkout", key="none") is None
    assert app.handle(handle.id).status() is Status.PENDING


def test_a_script_starts_later(lone_app: App) -> None:
    app = lone_app.blocking
    instant = datetime(2100, 1, 1, tzinfo=UTC)
    assert app.start(Invocation("checkout"), delay=timedelta(hours=1)).status() is Status.WAITING
    assert app.start(Invocation("checkout"), start_at=instant).describe().wake_at == instant


def test_a_script_starts_many_and_lists_them(lone_app: App) -> None:
    app = lone_app.blocking
    handles = app.start_many([Invocation("one", 1), Start(Invocation("two", 2), key="k")], queue="batch")
    assert [handle.key for handle in handles] == [None, "k"]
    app.start_many(Invocation("many", number) for number in range(250))
    assert len(list(app.workflows())) == 252
    assert {each.id for each in app.workflows(queue="batch")} == {handle.id for handle in handles}
    assert [each.name for each in app.workflows(key_prefix="k")] == ["two"]
    assert len(list(app.workflows(limit=3))) == 3


async def test_a_thread_runs_workflows_and_gets_their_results(app: App) -> None:
    @step
    async def charge(cents: int) -> str:
        return f"paid {cents}"

    @app.workflow
    async def checkout(cents: int) -> str:
        return await charge(cents)

    def script() -> list[Any]:
        handle = app.blocking.start(checkout(1))
        assert handle.result(timeout=SOON) == "paid 1"
        return [app.blocking.run(checkout(2)), [each.name for each in handle.steps()], handle.status()]

    async with app.worker():
        assert await asyncio.to_thread(script) == ["paid 2", ["charge"], Status.SUCCESS]


async def test_errors_come_out_as_they_do_elsewhere(app: App) -> None:
    gate = Gate()

    @app.workflow
    async def failing() -> None:
        raise KeyError("x")

    @app.workflow
    async def slow() -> None:
        await hold(gate)

    def script() -> None:
        with pytest.raises(KeyError, match="x"):
            app.blocking.run(failing())
        handle = app.blocking.start(slow())
        with pytest.raises(ResultTimeout):
            handle.result(timeout=timedelta(milliseconds=10))
        with pytest.raises(WorkflowNotFound):
            app.blocking.handle(any_uuid()).status()

    async with app.worker():
        await asyncio.to_thread(script)
        gate.open()


async def test_many_threads_share_it(app: App) -> None:
    @app.workflow
    async def double(number: int) -> int:
        return 2 * number

    def script(number: int) -> int:
        return app.blocking.run(double(number))

    async with app.worker():
        with ThreadPoolExecutor(8) as pool:
            loop = asyncio.get_running_loop()
            results = await asyncio.gather(*(loop.run_in_executor(pool, script, number) for number in range(40)))
    assert results == [2 * number for number in range(40)]


VERBS: dict[str, tuple[str, Callable[[App], object]]] = {
    "start": ("app.start", lambda app: app.blocking.start(Invocation("checkout"))),
    "start_many": ("app.start_many", lambda app: app.blocking.start_many([Invocation("checkout")])),
    "run": ("app.run", lambda app: app.blocking.run(Invocation("checkout"))),
    "find": ("app.find", lambda app: app.blocking.find("checkout", key="k")),
    "workflows": ("app.workflows", lambda app: list(app.blocking.workflows())),
    "result": ("handle.result", lambda app: app.blocking.handle(any_uuid()).result()),
    "status": ("handle.status", lambda app: app.blocking.handle(any_uuid()).status()),
    "describe": ("handle.describe", lambda app: app.blocking.handle(any_uuid()).describe()),
    "steps": ("handle.steps", lambda app: app.blocking.handle(any_uuid()).steps()),
    "close": ("app.close", lambda app: app.blocking.close()),
}


@pytest.mark.parametrize(("name", "verb"), VERBS.values(), ids=VERBS.keys())
async def test_in_a_running_loop_it_names_the_verb_to_await(app: App, name: str, verb: Callable[[App], object]) -> None:
    with pytest.raises(WrongPlace, match=rf"await {re.escape(name)}|async for .*{re.escape(name)}"):
        verb(app)
    gc.collect()


async def test_a_start_with_a_connection_is_refused_in_a_running_loop_too(app: App, database_url: str) -> None:
    assert await app.find("checkout", key="k") is None
    with psycopg.connect(database_url) as connection, pytest.raises(WrongPlace, match=r"await app\.start"):
        app.blocking.start(Invocation("checkout"), connection=connection)


def test_a_start_in_the_callers_transaction_commits_with_it(lone_app: App, database_url: str) -> None:
    app = lone_app.blocking
    list(app.workflows())
    with psycopg.connect(database_url) as connection:
        one = app.start(Invocation("checkout"), connection=connection)
        keyed = app.start(Invocation("checkout"), key="k", connection=connection)
        with pytest.raises(WorkflowNotFound):
            one.status()
        connection.commit()
    assert one.status() is Status.PENDING
    assert keyed.status() is Status.PENDING


def test_a_start_in_the_callers_transaction_rolls_back_with_it(lone_app: App, database_url: str) -> None:
    app = lone_app.blocking
    list(app.workflows())
    with psycopg.connect(database_url) as connection:
        app.start(Invocation("checkout"), connection=connection)
        app.start(Invocation("checkout"), key="k", connection=connection)
        connection.rollback()
    assert list(app.workflows()) == []


def test_a_start_in_the_callers_transaction_may_be_the_first_verb_of_all(lone_app: App, database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        handle = lone_app.blocking.start(Invocation("checkout"), connection=connection)
        connection.commit()
    assert handle.status() is Status.PENDING


def test_many_starts_in_the_callers_transaction_commit_with_it(lone_app: App, database_url: str) -> None:
    app = lone_app.blocking
    list(app.workflows())
    with psycopg.connect(database_url) as connection:
        app.start_many([Invocation("checkout", number) for number in range(3)], connection=connection)
        assert list(app.workflows()) == []
        connection.commit()
    assert len(list(app.workflows())) == 3


def test_it_is_a_context_manager(database_url: str, schema: str) -> None:
    with App(database_url=database_url, schema=schema).blocking as app:
        assert list(app.workflows()) == []


def test_after_it_was_closed_it_opens_again(lone_app: App) -> None:
    handle = lone_app.blocking.start(Invocation("checkout"))
    lone_app.blocking.close()
    assert handle.status() is Status.PENDING


FORK = """
import json, os, sys
from perdure import App, Invocation

app = App(database_url=sys.argv[1], schema=sys.argv[2])
mine = app.blocking.start(Invocation("parent"))
children = []
for number in range(2):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        handle = app.blocking.start(Invocation("child", number))
        status = app.blocking.handle(mine.id).status()
        os.write(write, json.dumps([str(handle.id), status]).encode())
        os._exit(0)
    os.close(write)
    children.append((child, read))
after = app.blocking.start(Invocation("parent"))
answers = [[str(mine.id), mine.status()], [str(after.id), after.status()]]
for child, read in children:
    answers.append(json.loads(os.read(read, 1000)))
    assert os.waitpid(child, 0)[1] == 0
print(json.dumps(answers))
"""


def test_a_forked_child_gets_connections_of_its_own(lone_app: App, database_url: str, schema: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, database_url, schema],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    answers = json.loads(ran.stdout)
    assert [status for _, status in answers] == ["pending"] * 4
    assert {str(each.id) for each in lone_app.blocking.workflows()} == {id for id, _ in answers}


MIRRORS = [
    (mirror, original, name)
    for mirror, original in ((BlockingApp, App), (BlockingHandle, Handle))
    for name in sorted(set(dir(mirror)) & set(dir(original)))
    if not name.startswith("_") and callable(getattr(original, name))
]


@pytest.mark.parametrize(("mirror", "original", "name"), MIRRORS, ids=lambda value: getattr(value, "__name__", value))
def test_a_blocking_verb_has_the_signature_and_the_docstring_of_the_awaited_one(
    mirror: type, original: type, name: str
) -> None:
    blocking, awaited = getattr(mirror, name), getattr(original, name)
    assert inspect.getdoc(blocking) == inspect.getdoc(awaited)
    assert inspect.getdoc(awaited)
    assert not inspect.iscoroutinefunction(blocking)
    assert signatures(blocking) == signatures(awaited)


@pytest.mark.parametrize(("mirror", "original"), [(BlockingApp, App), (BlockingHandle, Handle)])
def test_every_verb_has_a_blocking_one(mirror: type, original: type) -> None:
    awaited = {
        name
        for kind in original.__mro__[:-1]
        for name, value in vars(kind).items()
        if not name.startswith("_") and (inspect.iscoroutinefunction(value) or inspect.isasyncgenfunction(value))
    }
    assert awaited <= set(dir(mirror))
    assert {name for name in dir(mirror) if not name.startswith("_")} <= set(dir(original)) | {"id", "key", "started"}


def signatures(function: Callable[..., Any]) -> list[tuple[list[Any], str]]:
    """Parameters and return type, of every overload, without what makes the one awaited and the other not."""
    found = []
    for each in [*typing.get_overloads(function), function]:
        signature = inspect.signature(each)
        returns = str(signature.return_annotation)
        returns = returns.replace("Blocking", "").replace("AsyncIterator", "Iterator")
        found.append((list(signature.parameters.values()), returns))
    return found
