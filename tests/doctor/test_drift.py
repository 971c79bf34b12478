"""Whatever is damaged in the schema is found, and what the doctor says mends it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from perdure import App
from perdure.config import Settings
from perdure.doctor import Finding, Level, examine

Sql = Callable[..., list[Any]]

DAMAGES = {
    "DROP INDEX queue_entries_pending": "index queue_entries_pending on table queue_entries is missing",
    "DROP INDEX waits_due; CREATE INDEX waits_due ON waits (wake_at)": "index waits_due on table waits isn't what it",
    "UPDATE pg_catalog.pg_index SET indisvalid = false WHERE indexrelid = 'waits_due'::regclass": "waits_due on table "
    "waits is invalid",
    "DROP VIEW queues": "view queues is missing",
    "CREATE OR REPLACE VIEW versions AS SELECT 'x'::text AS version, 1::int8 AS pending, 1::int8 AS running, "
    "1::int8 AS waiting, 1::int8 AS workers": "view versions isn't what it should be",
    "CREATE OR REPLACE FUNCTION now() RETURNS timestamptz LANGUAGE sql STABLE PARALLEL SAFE AS "
    "'SELECT pg_catalog.now()'": "function now() isn't what it should be",
    "ALTER TABLE waits ALTER COLUMN epoch DROP DEFAULT": "column epoch of table waits is bigint NOT NULL, not bigint "
    "NOT NULL DEFAULT 0",
    "ALTER TABLE outbox ALTER COLUMN created_at DROP NOT NULL": "column created_at of table outbox is timestamp with",
    "ALTER TABLE retention_rows ALTER COLUMN keep_seconds TYPE float4": "keep_seconds of table retention_rows is real",
    "ALTER TABLE outbox DROP COLUMN worker_id": "column worker_id of table outbox is missing",
    "ALTER TABLE outbox ADD COLUMN owner int NOT NULL": "column owner of table outbox isn't perdure's, and it takes no",
    "ALTER TABLE waits DROP CONSTRAINT waits_pkey": "constraint waits_pkey of table waits is missing",
    "ALTER TABLE checkpoints DROP CONSTRAINT checkpoints_kind_check": "checkpoints_kind_check of table checkpoints is",
    "ALTER TABLE waits ADD CHECK (priority < 100)": "constraint waits_priority_check of table waits isn't perdure's",
    "DROP TABLE event_waits": "table event_waits is missing, with all that was in it",
    "DROP TABLE queue_entries CASCADE": "table queue_entries is missing, with all that was in it",
    "CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; "
    "CREATE TRIGGER slow AFTER INSERT ON checkpoints FOR EACH ROW EXECUTE FUNCTION nothing()": "table checkpoints has "
    "a trigger, slow",
}


@pytest.fixture
async def settings(app: App, database_url: str, schema: str) -> Settings:
    """Of a schema that is as it should be."""
    await app.session().database.fetch("clock")
    return Settings(database_url=database_url, schema=schema, migrate=False, read_only=True)


async def of_schema(settings: Settings) -> list[Finding]:
    return [finding for finding in await examine(settings) if finding.check == "schema"]


async def test_a_schema_that_was_just_made_is_as_it_should_be(settings: Settings, sql: Sql) -> None:
    assert [finding.level for finding in await of_schema(settings)] == [Level.OK]
    assert sql("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'perdure_doctor%%'") == []


@pytest.mark.parametrize("damage", DAMAGES)
async def test_what_is_damaged_is_found_and_mended_by_what_it_says(settings: Settings, sql: Sql, damage: str) -> None:
    sql(damage)
    findings = await of_schema(settings)
    assert any(DAMAGES[damage] in finding.text for finding in findings), findings
    assert {finding.level for finding in findings} <= {Level.PROBLEM, Level.WARNING}
    for finding in findings:
        for statement in finding.sql:
            sql(statement)
    left = [finding for finding in await of_schema(settings) if finding.level in (Level.PROBLEM, Level.WARNING)]
    assert left == []


@pytest.mark.parametrize(
    ("addition", "text"),
    [
        ("ALTER TABLE outbox ADD COLUMN owner text", "column owner of table outbox isn't perdure's"),
        ("CREATE INDEX mine ON workflow_rows (created_at)", "index mine on table workflow_rows isn't perdure's"),
        ("ALTER TABLE waits SET (fillfactor = 90)", "storage parameters of table waits are"),
    ],
)
async def test_what_does_no_harm_is_noted(settings: Settings, sql: Sql, addition: str, text: str) -> None:
    sql(addition)
    (finding,) = await of_schema(settings)
    assert (finding.level, finding.sql) == (Level.NOTE, ())
    assert text in finding.text


@pytest.mark.parametrize("schema", ['Odd "name"', "perdure.perdure", "it's"])
async def test_schemas_with_odd_names_are_compared_alike(settings: Settings, database_url: str, schema: str) -> None:
    quoted = '"' + schema.replace('"', '""') + '"'
    with psycopg.connect(database_url, autocommit=True) as connection:
        try:
            assert [finding.level for finding in await of_schema(settings)] == [Level.OK]
            connection.execute(f"DROP VIEW {quoted}.queues".encode())
            (finding,) = await of_schema(settings)
            for statement in finding.sql:
                connection.execute(statement.encode())
            assert [finding.level for finding in await of_schema(settings)] == [Level.OK]
        finally:
            connection.execute(f"DROP SCHEMA {quoted} CASCADE".encode())


async def test_where_there_is_no_schema_it_says_so_and_makes_none(database_url: str, schema: str, sql: Sql) -> None:
    findings = await examine(Settings(database_url=database_url, schema=schema, read_only=True))
    problems = [finding.text for finding in findings if finding.check != "server" and finding.level is Level.PROBLEM]
    assert problems == [f"there is no schema {schema!r} of perdure here"]
    assert sql("SELECT 1 FROM pg_namespace WHERE nspname = %s", schema) == []


async def test_a_schema_of_other_migrations_is_told(settings: Settings, sql: Sql) -> None:
    sql("UPDATE migrations SET checksum = 'another' WHERE version = 1")
    (finding,) = await of_schema(settings)
    assert (finding.level, "another version of 0001_initial" in finding.text) == (Level.PROBLEM, True)


async def test_a_role_that_may_not_create_is_told_that_nothing_was_compared(
    settings: Settings, sql: Sql, database_url: str, schema: str
) -> None:
    role = f"reader_{schema}"
    sql(f"CREATE ROLE {role} LOGIN")
    try:
        sql(f"GRANT USAGE ON SCHEMA {schema} TO {role}")
        sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO {role}")
        url = psycopg.conninfo.make_conninfo(database_url, user=role)
        findings = await examine(Settings(database_url=url, schema=schema, read_only=True, migrate=False))
        levels = {finding.check: finding.level for finding in findings if finding.check != "server"}
        assert (levels["schema"], levels["rights"], levels["xmin"]) == (Level.NOTE, Level.NOTE, Level.NOTE)
        assert Level.PROBLEM not in levels.values()
    finally:
        sql(f"DROP OWNED BY {role}; DROP ROLE {role}")
