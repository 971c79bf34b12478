"""What tests leave behind is swept away, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from perdure.testing import place

MINE = ("perdure_test_cafe", "perdure_test_1", "perdure_test_1_orders", "perdure_test_00000001_0123456789_kept")
OLD = "perdure_test_00000001_0123456789"


@pytest.fixture
def schemas(database_url: str) -> Iterator[psycopg.Connection[tuple[str]]]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        for name in (*MINE, OLD, place.new_schema()):
            connection.execute(f"CREATE SCHEMA {name}".encode())
        yield connection
        for (name,) in connection.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'perdure_test%'"):
            connection.execute(f"DROP SCHEMA {name}".encode())


async def test_a_schema_that_only_begins_like_a_tests_own_is_nobodys_to_delete(
    schemas: psycopg.Connection[tuple[str]], database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "_swept", set())
    before = {name for (name,) in schemas.execute("SELECT nspname FROM pg_namespace")}
    await place.sweep(database_url)
    after = {name for (name,) in schemas.execute("SELECT nspname FROM pg_namespace")}
    assert before - after == {OLD}
