"""Paging through workflows: the statements walk in chunks, and what they give is what the public view would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg import RawCursor

from perdure.embedded import Cluster
from perdure.store import arrays, migrations
from perdure.store.statements import SHARD, in_schema, statements

# In turns pending, running, waiting, success, error and cancelled, but for a stretch in which nothing has ended: chunks
# come out empty, full and in between.
_FILL = """
INSERT INTO perdure.workflow_rows (shard, id, name, key, queue, attributes, created_at)
SELECT 1, ('01900000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, 'work-' || n % 7,
       CASE WHEN n % 5 = 0 THEN 'key-' || n END, 'queue-' || n % 3,
       CASE WHEN n % 11 = 0 THEN '{"customer": 1, "n": 2}'::json END, timestamptz '2025-01-01' + n * interval '1 second'
FROM generate_series(1, 700) AS n;

INSERT INTO perdure.queue_entries (shard, workflow_id, queue, name, enqueued_at, worker_id, started_at)
SELECT shard, id, queue, name, created_at,
       CASE WHEN place % 6 = 1 THEN ('00000000-0000-0000-0000-00000000000' || place % 5)::uuid END, created_at
FROM (SELECT *, row_number() OVER (ORDER BY id) AS place FROM perdure.workflow_rows) AS numbered
WHERE place % 6 IN (0, 1) OR place BETWEEN 300 AND 500;

INSERT INTO perdure.waits (shard, workflow_id, waiting_for, queue, name, enqueued_at, created_at)
SELECT shard, id, 'worker', queue, name, created_at, created_at
FROM (SELECT *, row_number() OVER (ORDER BY id) AS place FROM perdure.workflow_rows) AS numbered
WHERE place % 6 = 2 AND place NOT BETWEEN 300 AND 500;

INSERT INTO perdure.checkpoints (shard, workflow_id, key, kind, position, status, payload, created_at)
SELECT shard, id, '$result', 'result', 2147483647, (ARRAY['success', 'error', 'cancelled'])[place % 6 - 2], '1',
       created_at
FROM (SELECT *, row_number() OVER (ORDER BY id) AS place FROM perdure.workflow_rows) AS numbered
WHERE place % 6 IN (3, 4, 5) AND place NOT BETWEEN 300 AND 500;
"""

FILTERS: dict[str, tuple[dict[str, object], str]] = {
    "all": ({}, "true"),
    "name": ({"name": "work-3"}, "name = 'work-3'"),
    "queue": ({"queue": "queue-1"}, "queue = 'queue-1'"),
    "key prefix": ({"key_prefix": "key-1"}, "starts_with(key, 'key-1')"),
    "since": ({"since": "2025-01-01 00:05:00+00"}, "created_at >= '2025-01-01 00:05:00+00'"),
    "until": ({"until": "2025-01-01 00:05:00+00"}, "created_at < '2025-01-01 00:05:00+00'"),
    "attributes": ({"attributes": '{"customer": 1}'}, """attributes @> '{"customer": 1}'"""),
    "none": ({"name": "nobody"}, "false"),
}
STATEMENTS = {
    None: "page_all",
    "success": "page_all",
    "cancelled": "page_all",
    "error": "page_failed",
    "pending": "page_active",
    "running": "page_active",
    "waiting": "page_active",
}


@pytest.fixture(scope="module")
def filled(cluster: Cluster) -> Iterator[psycopg.Connection[Any]]:
    """A connection to a server with 700 workflows in the schema `pages`; nothing is left of them."""
    with psycopg.connect(cluster.url, autocommit=True, cursor_factory=RawCursor) as connection:
        arrays.register(connection.adapters)
        for text in (migrations.script("pages"), in_schema(_FILL, "pages")):
            psycopg.ClientCursor(connection).execute(text.encode())
        connection.execute("SET search_path = pages")
        yield connection
        connection.execute("DROP SCHEMA pages CASCADE")


@pytest.fixture
def walk(filled: psycopg.Connection[Any]) -> Callable[..., list[UUID]]:
    """Page through to the end, as the client does."""

    def walk(status: str | None, size: int, **given: object) -> list[UUID]:
        columns = ("name", "queue", "key_prefix", "since", "until", "attributes")
        text = statements("pages")[STATEMENTS[status]].text
        seen: list[UUID] = []
        while True:
            params = (SHARD, seen[-1] if seen else None, *(given.get(column) for column in columns), status, size)
            page = [row[0] for row in filled.cursor(binary=True).execute(text, params)]
            seen += page
            if len(page) < size:
                return seen

    return walk


@pytest.mark.parametrize("size", [1, 49, 50, 51, 1000])
@pytest.mark.parametrize("status", STATEMENTS)
def test_pages_of_any_size_give_each_workflow_once_newest_first(
    status: str | None, size: int, filled: psycopg.Connection[Any], walk: Callable[..., list[UUID]]
) -> None:
    expected = filled.execute(
        "SELECT id FROM workflows WHERE $1::text IS NULL OR status = $1 ORDER BY id DESC", (status,)
    ).fetchall()

    assert walk(status, size) == [id for (id,) in expected]
    assert len(expected) > 50


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("status", STATEMENTS)
def test_filters_let_through_what_the_view_shows(
    status: str | None, filter: str, filled: psycopg.Connection[Any], walk: Callable[..., list[UUID]]
) -> None:
    given, condition = FILTERS[filter]
    expected = filled.execute(
        f"SELECT id FROM workflows WHERE ($1::text IS NULL OR status = $1) AND ({condition}) ORDER BY id DESC",
        (status,),
    ).fetchall()

    assert walk(status, 20, **given) == [id for (id,) in expected]
