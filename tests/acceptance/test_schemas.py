"""Schemas: two apps in one database don't meet."""

from __future__ import annotations

from uuid import uuid4 as any_uuid

import pytest

from acceptance.support import SOON, all_workflows
from perdure import App, Client, ConfigurationError, Invocation, Status, WorkflowNotFound


async def test_two_apps_in_two_schemas_do_not_meet(app: App, database_url: str) -> None:
    async with App("other", database_url=database_url, schema=f"other_{any_uuid().hex[:12]}") as other:

        @app.workflow(name="checkout")
        async def ours() -> str:
            return "ours"

        @other.workflow(name="checkout")
        async def theirs() -> str:
            return "theirs"

        our, their = await app.start(ours(), key="k"), await other.start(theirs(), key="k")
        assert our.started
        assert their.started
        async with app.worker():
            assert await our.result(timeout=SOON) == "ours"
            assert await app.run(ours()) == "ours"
            assert await their.status() is Status.PENDING
        with pytest.raises(WorkflowNotFound):
            await app.handle(their.id).status()
        assert await other.find("checkout", key="k") is not None
        assert len(await all_workflows(app)) == 2
        assert [each.id for each in await all_workflows(other)] == [their.id]
        async with other.worker():
            assert await their.result(timeout=SOON) == "theirs"


async def test_workers_of_two_schemas_run_side_by_side_in_one_process(app: App, database_url: str) -> None:
    async with App("other", database_url=database_url, schema=f"other_{any_uuid().hex[:12]}") as other:

        @app.workflow(name="checkout")
        async def ours() -> str:
            return "ours"

        @other.workflow(name="checkout")
        async def theirs() -> str:
            return "theirs"

        async with app.worker(), other.worker():
            assert [await app.run(ours()), await other.run(theirs()), await app.run(ours())] == [
                "ours",
                "theirs",
                "ours",
            ]


@pytest.mark.parametrize("name", ["UPPER Case", 'quo"te', "sélect", "select", "a.b", "x" * 63, "%s", "$1"])
async def test_a_schema_may_have_any_name(database_url: str, name: str) -> None:
    schema = f"{name[:50]}{any_uuid().hex[:12]}"
    async with App(database_url=database_url, schema=schema) as app:

        @app.workflow
        async def double(number: int) -> int:
            return 2 * number

        async with app.worker():
            assert await app.run(double(4), key="k") == 8
        assert len(await all_workflows(app)) == 1


@pytest.mark.parametrize("name", ["", "x" * 64, "a\0b"])
def test_what_can_be_no_schema_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="schema"):
        Client("postgresql://localhost", schema=name)


async def test_a_client_sees_its_schema_only(app: App, database_url: str, schema: str) -> None:
    handle = await app.start(Invocation("anything"))
    async with Client(database_url, schema=schema) as same:
        assert await same.handle(handle.id).status() is Status.PENDING
    async with Client(database_url, schema=f"other_{any_uuid().hex[:12]}") as other:
        assert [each async for each in other.workflows()] == []
