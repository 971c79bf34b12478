"""The schema: how it comes to be, by whom, in what pieces, and what is said where it isn't right.

`head.txt` is what zero to head gives. Whoever changes the schema on purpose writes it anew, and reads the difference:

    PERDURE_WRITE_HEAD=1 python -m pytest tests/migrations -k head
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection, AsyncRawCursor, Connection
from psycopg.conninfo import make_conninfo
from snapshot import snapshot

from perdure import App, embedded
from perdure.errors import ConfigurationError, SchemaError
from perdure.store import migrations
from perdure.store.migrations import Migration

HEAD = Path(__file__).with_name("head.txt")

ODD_NAMES = [
    "Capital",
    "two words",
    'a "quoted" one',
    "perdure.perdure",
    "it's",
    "$1",
    "select",
    "größe",
    "%s",
    "x" * 63,
]


@pytest.fixture
def admin(database_url: str) -> Iterator[Connection[Any]]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def new_schema(admin: Connection[Any]) -> Iterator[Callable[[str], str]]:
    """Names that may be used by one test only; nothing of them is left."""
    used: list[str] = []

    def new(name: str) -> str:
        used.append(name)
        return name

    yield new
    for name in used:
        admin.execute(f"DROP SCHEMA IF EXISTS {_quoted(name)} CASCADE".encode())


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[AsyncConnection[Any]]:
    """A connection as the engine makes them."""
    connection = await AsyncConnection.connect(url, autocommit=True, cursor_factory=AsyncRawCursor)
    async with connection:
        yield connection


async def migrate(url: str, schema: str) -> tuple[Migration, ...]:
    async with connected(url) as connection:
        return await migrations.ensure(connection, schema, apply=True)


async def use(url: str, schema: str) -> None:
    """Call a verb: it looks at the schema first."""
    async with App("tests", database_url=url, schema=schema) as app:
        assert [workflow async for workflow in app.workflows()] == []


def later(text: str, *, oldest_code: int = 1) -> Migration:
    """A migration that comes after all that there are."""
    text = f"-- :oldest-code {oldest_code}\n{text}"
    return Migration(version=migrations.known()[-1].version + 1, name="later", text=text)


@pytest.fixture
def knowing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the code know these migrations, as another release would."""
    return lambda *known: monkeypatch.setattr(migrations, "known", lambda: known)


ALL = migrations.known()


# --- from zero to head ------------------------------------------------------------------------------------------------


async def test_zero_to_head_gives_the_schema_of_head_txt(
    database_url: str, schema: str, admin: Connection[Any]
) -> None:
    await migrate(database_url, schema)

    found = snapshot(admin, schema)
    if os.environ.get("PERDURE_WRITE_HEAD"):
        HEAD.write_text(found, encoding="utf-8")
    assert found == HEAD.read_text(encoding="utf-8")


async def test_a_second_migration_finds_nothing_to_do(database_url: str, schema: str) -> None:
    assert await migrate(database_url, schema) == ALL
    assert await migrate(database_url, schema) == ()


async def test_eight_at_once_migrate_once(database_url: str, schema: str, admin: Connection[Any]) -> None:
    applied = await asyncio.gather(*(migrate(database_url, schema) for _ in range(8)))

    assert sorted(applied, key=len) == [*[()] * 7, ALL]
    assert snapshot(admin, schema) == HEAD.read_text(encoding="utf-8")


async def test_eight_apps_at_once_find_a_schema_that_they_can_use(database_url: str, schema: str) -> None:
    await asyncio.gather(*(use(database_url, schema) for _ in range(8)))


async def test_the_steps_between_releases_lead_to_the_same_schema_as_all_at_once(
    database_url: str, schema: str, admin: Connection[Any], knowing: Callable[..., None]
) -> None:
    await migrate(database_url, schema)
    new = later("CREATE TABLE perdure.later (shard int4 NOT NULL, PRIMARY KEY (shard))")
    knowing(*ALL, new)

    assert await migrate(database_url, schema) == (new,)
    assert await migrate(database_url, f"{schema}_new") == (*ALL, new)
    assert snapshot(admin, schema) == snapshot(admin, f"{schema}_new")


@pytest.mark.parametrize("name", ODD_NAMES)
async def test_a_schema_may_be_called_anything(
    name: str, database_url: str, admin: Connection[Any], new_schema: Callable[[str], str]
) -> None:
    await use(database_url, new_schema(name))

    assert admin.execute("SELECT count(*) FROM pg_namespace WHERE nspname = %s", (name,)).fetchone() == (1,)
    assert snapshot(admin, name) == HEAD.read_text(encoding="utf-8")


async def test_two_schemas_in_one_database_do_not_meet(database_url: str, schema: str, admin: Connection[Any]) -> None:
    other = f"{schema}_other"
    await migrate(database_url, schema)
    await migrate(database_url, other)
    admin.execute(f"DROP TABLE {schema}.waits CASCADE".encode())
    stopped = "RETURNS timestamptz LANGUAGE sql STABLE AS 'SELECT NULL::timestamptz'"
    admin.execute(f"CREATE OR REPLACE FUNCTION {schema}.now() {stopped}".encode())

    assert snapshot(admin, other) == HEAD.read_text(encoding="utf-8")
    await use(database_url, other)
    ids = {admin.execute(f"SELECT id FROM {name}.installation".encode()).fetchone() for name in (schema, other)}
    assert len(ids) == 2


@pytest.mark.parametrize("path", ["", "nowhere", "pg_temp", "public"])
async def test_the_search_path_does_not_matter(
    path: str, database_url: str, schema: str, admin: Connection[Any]
) -> None:
    url = make_conninfo(database_url, options=f"-c search_path={path}")

    await use(url, schema)

    assert snapshot(admin, schema) == HEAD.read_text(encoding="utf-8")


@pytest.mark.parametrize("level", ["read committed", "repeatable read", "serializable"])
async def test_the_isolation_level_of_the_role_does_not_matter(
    level: str, database_url: str, schema: str, admin: Connection[Any]
) -> None:
    escaped = level.replace(" ", "\\ ")
    url = make_conninfo(database_url, options=f"-c default_transaction_isolation={escaped}")

    await asyncio.gather(*(use(url, schema) for _ in range(4)))

    assert snapshot(admin, schema) == HEAD.read_text(encoding="utf-8")


# --- the script -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["perdure_script", 'with "quotes" and $1'])
def test_the_script_run_by_psql_gives_what_migrate_gives(
    name: str, database_url: str, admin: Connection[Any], new_schema: Callable[[str], str]
) -> None:
    script = migrations.script(new_schema(name))

    psql = [str(embedded.psql_path()), "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", database_url]
    done = subprocess.run(psql, input=script, text=True, encoding="utf-8", capture_output=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    assert snapshot(admin, name) == HEAD.read_text(encoding="utf-8")


async def test_the_script_run_as_one_query_gives_what_migrate_gives(
    database_url: str, schema: str, admin: Connection[Any]
) -> None:
    admin.execute("SET search_path = ''")
    admin.execute(migrations.script(schema).encode())
    admin.execute("RESET search_path")

    assert snapshot(admin, schema) == HEAD.read_text(encoding="utf-8")
    assert await migrate(database_url, schema) == ()


# --- who may be older or newer ----------------------------------------------------------------------------------------


async def test_older_code_runs_on_a_newer_schema_that_allows_it(
    database_url: str, schema: str, knowing: Callable[..., None]
) -> None:
    knowing(*ALL, later("ALTER TABLE perdure.workflow_rows ADD COLUMN later text", oldest_code=ALL[-1].version))
    await migrate(database_url, schema)

    knowing(*ALL)
    assert await migrate(database_url, schema) == ()
    await use(database_url, schema)


async def test_code_that_is_too_old_for_the_schema_is_told_so(
    database_url: str, schema: str, knowing: Callable[..., None]
) -> None:
    new = later("ALTER TABLE perdure.workflow_rows DROP COLUMN detached", oldest_code=ALL[-1].version + 1)
    knowing(*ALL, new)
    await migrate(database_url, schema)

    knowing(*ALL)
    with pytest.raises(SchemaError, match=rf"needs perdure's migration {new.version}.*upgrade perdure"):
        await use(database_url, schema)


async def test_a_migration_that_says_nothing_of_older_code_locks_it_out() -> None:
    silent = Migration(version=7, name="silent", text="CREATE TABLE perdure.silent (shard int4)")

    assert silent.oldest_code == 7


async def test_a_schema_that_was_made_by_another_text_is_refused(
    database_url: str, schema: str, admin: Connection[Any]
) -> None:
    await migrate(database_url, schema)
    admin.execute(f"UPDATE {schema}.migrations SET checksum = 'another' WHERE version = 1".encode())

    with pytest.raises(SchemaError, match="made by another version of 0001_initial"):
        await use(database_url, schema)


# --- what is half there -----------------------------------------------------------------------------------------------


async def test_a_gap_among_the_migrations_is_refused(
    database_url: str, schema: str, admin: Connection[Any], knowing: Callable[..., None]
) -> None:
    knowing(*ALL, later("SELECT 1"))
    await migrate(database_url, schema)
    admin.execute(f"DELETE FROM {schema}.migrations WHERE version = 1".encode())

    with pytest.raises(SchemaError, match="half-migrated: version 1 is missing"):
        await use(database_url, schema)


@pytest.mark.parametrize("table", ["workflow_rows", "queue_entries", "checkpoints", "worker_rows", "queue_rows"])
async def test_a_table_that_was_dropped_is_named_by_every_verb(
    table: str, database_url: str, schema: str, admin: Connection[Any]
) -> None:
    async with App("tests", database_url=database_url, schema=schema) as app:

        @app.workflow
        async def nothing() -> None: ...

        handle = await app.start(nothing())
        admin.execute(f"DROP TABLE {schema}.{table} CASCADE".encode())

        verbs: dict[str, Callable[[], Any]] = {
            "workflow_rows": lambda: app.start(nothing()),
            "queue_entries": lambda: app.start(nothing()),
            "checkpoints": lambda: handle.result(),
            "worker_rows": lambda: _run_worker(app),
            "queue_rows": lambda: app.start(nothing()),
        }
        with pytest.raises(SchemaError, match=rf"(?s)'{schema}' is not complete: .*{table}.*perdure migrate"):
            await verbs[table]()


async def _run_worker(app: App) -> None:
    async with app.worker():
        raise AssertionError("the worker started")


async def test_a_migration_that_dies_in_the_middle_leaves_nothing(
    database_url: str, schema: str, admin: Connection[Any], knowing: Callable[..., None]
) -> None:
    suicidal = later("CREATE TABLE perdure.one (a int4); SELECT pg_terminate_backend(pg_backend_pid());")
    knowing(*ALL, suicidal)
    with pytest.raises(psycopg.OperationalError):
        await migrate(database_url, schema)

    tables = admin.execute("SELECT tablename FROM pg_tables WHERE schemaname = %s", (schema,)).fetchall()
    assert tables == [("migrations",)]
    assert admin.execute(f"SELECT count(*) FROM {schema}.migrations".encode()).fetchone() == (0,)
    knowing(*ALL)
    assert await migrate(database_url, schema) == ALL
    assert snapshot(admin, schema) == HEAD.read_text(encoding="utf-8")


async def test_a_migration_that_dies_between_releases_leaves_the_older_schema(
    database_url: str, schema: str, admin: Connection[Any], knowing: Callable[..., None]
) -> None:
    await migrate(database_url, schema)
    knowing(*ALL, later("DROP TABLE perdure.waits CASCADE; SELECT pg_terminate_backend(pg_backend_pid());"))
    with pytest.raises(psycopg.OperationalError):
        await migrate(database_url, schema)

    assert snapshot(admin, schema) == HEAD.read_text(encoding="utf-8")


async def test_a_migration_that_fails_leaves_nothing_and_says_why(
    database_url: str, schema: str, admin: Connection[Any], knowing: Callable[..., None]
) -> None:
    knowing(*ALL, later("CREATE TABLE perdure.one (a int4); SELECT 1 / 0;"))
    with pytest.raises(psycopg.errors.DivisionByZero):
        await migrate(database_url, schema)

    assert admin.execute("SELECT count(*) FROM pg_tables WHERE schemaname = %s", (schema,)).fetchone() == (1,)


# --- who may not ------------------------------------------------------------------------------------------------------


async def test_with_migrations_off_nothing_is_made(
    database_url: str, schema: str, admin: Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERDURE_MIGRATE", "off")

    with pytest.raises(SchemaError, match=r"lacks 0001_initial.*; run 'perdure migrate'"):
        await use(database_url, schema)

    assert admin.execute("SELECT count(*) FROM pg_namespace WHERE nspname = %s", (schema,)).fetchone() == (0,)


async def test_with_migrations_off_a_schema_that_is_there_is_used(
    database_url: str, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await migrate(database_url, schema)
    monkeypatch.setenv("PERDURE_MIGRATE", "off")

    await use(database_url, schema)


@pytest.fixture
def stranger(database_url: str, schema: str, admin: Connection[Any]) -> Iterator[str]:
    """The URL of a role that may connect, and nothing else."""
    role = f"{schema}_stranger"
    admin.execute(f"CREATE ROLE {role} LOGIN".encode())
    yield make_conninfo(database_url, user=role)
    admin.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())


async def test_who_may_not_create_a_schema_is_told_so(stranger: str, schema: str) -> None:
    with pytest.raises(ConfigurationError, match="permission denied for database") as raised:
        await use(stranger, schema)

    assert "check the URL, the role and its rights" in str(raised.value)


async def test_who_may_not_use_the_schema_is_told_so(stranger: str, database_url: str, schema: str) -> None:
    await migrate(database_url, schema)

    with pytest.raises(ConfigurationError, match=f"permission denied for schema {schema}"):
        await use(stranger, schema)


async def test_who_may_not_read_the_tables_is_told_so(
    stranger: str, database_url: str, schema: str, admin: Connection[Any]
) -> None:
    await migrate(database_url, schema)
    admin.execute(f"GRANT USAGE ON SCHEMA {schema} TO {schema}_stranger".encode())
    admin.execute(f"GRANT SELECT ON {schema}.migrations TO {schema}_stranger".encode())

    with pytest.raises(ConfigurationError, match="permission denied for table workflow_rows"):
        await use(stranger, schema)


async def test_who_may_only_write_needs_no_right_to_create(
    stranger: str, database_url: str, schema: str, admin: Connection[Any]
) -> None:
    await migrate(database_url, schema)
    admin.execute(f"GRANT USAGE ON SCHEMA {schema} TO {schema}_stranger".encode())
    admin.execute(
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {schema}_stranger".encode()
    )

    async with App("tests", database_url=stranger, schema=schema) as app:

        @app.workflow
        async def double(number: int) -> int:
            return number * 2

        async with app.worker():
            assert await app.run(double(21)) == 42


async def test_the_owner_of_a_schema_that_was_made_for_him_needs_no_right_to_create_schemas(
    stranger: str, schema: str, admin: Connection[Any]
) -> None:
    admin.execute(f"CREATE SCHEMA {schema} AUTHORIZATION {schema}_stranger".encode())

    await use(stranger, schema)
