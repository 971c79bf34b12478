"""The public views: what teams query, chart and alert on. Columns may be added at the end; nothing else may change."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import Connection

from perdure.embedded import Cluster
from perdure.model.statuses import Status
from perdure.store import migrations

VIEWS = {
    "workflows": """
        id uuid, name text, key text, status text, queue text, priority integer, partition text, input jsonb,
        output jsonb, error jsonb, worker_id uuid, epoch bigint, recoveries integer, parent_id uuid, version text,
        attributes jsonb, created_at timestamptz, started_at timestamptz, updated_at timestamptz, wake_at timestamptz,
        waiting_for text, deadline timestamptz, completed_at timestamptz, forked_from uuid
    """,
    "workflow_steps": """
        workflow_id uuid, key text, name text, kind text, position integer, status text, output jsonb, error jsonb,
        attempts integer, started_at timestamptz, completed_at timestamptz, created_at timestamptz, worker_id uuid,
        epoch bigint, version text, wake_at timestamptz
    """,
    "workers": """
        id uuid, status text, app text, version text, host text, pid integer, queues jsonb, names jsonb,
        concurrency integer, running bigint, started_at timestamptz, heartbeat_at timestamptz, expires_at timestamptz,
        ended_at timestamptz, only_version boolean
    """,
    "queues": """
        name text, paused boolean, pending bigint, running bigint, oldest_pending_at timestamptz,
        created_at timestamptz
    """,
    "messages": """
        workflow_id uuid, id uuid, topic text, payload jsonb, sender_id uuid, created_at timestamptz,
        received_at timestamptz, place bigint
    """,
    "events": "workflow_id uuid, name text, number bigint, value jsonb, created_at timestamptz",
    "stream_entries": """
        workflow_id uuid, name text, number bigint, value jsonb, step_key text, attempt integer, is_void boolean,
        created_at timestamptz
    """,
    "versions": "version text, pending bigint, running bigint, waiting bigint, workers bigint",
}

# The tables that a status is read from, beside workflow_rows and the input's checkpoint.
SOURCES = {
    Status.PENDING: {"queue_entries"},
    Status.RUNNING: {"queue_entries"},
    Status.WAITING: {"waits"},
    Status.SUCCESS: {"checkpoints"},
    Status.ERROR: {"checkpoints"},
    Status.CANCELLED: {"checkpoints"},
}

FAILED_STEPS = "SELECT * FROM workflow_steps WHERE status = 'error' AND created_at > now() - interval '1 month';"
OLDEST_PENDING = "SELECT * FROM workflows WHERE status = 'pending' ORDER BY created_at LIMIT 10;"


@pytest.fixture
def connection(cluster: Cluster, schema: str) -> Iterator[Connection[Any]]:
    """A connection of somebody who has only said `SET search_path = <schema>`."""
    with psycopg.connect(cluster.url, autocommit=True) as connection:
        connection.execute(migrations.script(schema).encode())
        connection.execute(f"SET search_path = {schema}".encode())
        yield connection


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_has_the_columns_that_are_promised(view: str, connection: Connection[Any], schema: str) -> None:
    found = connection.execute(
        "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute"
        " WHERE attrelid = %s::regclass AND attnum > 0 ORDER BY attnum",
        (f"{schema}.{view}",),
    ).fetchall()

    promised = [tuple(column.split()) for column in " ".join(VIEWS[view].split()).split(", ")]
    assert [(name, type.replace("timestamp with time zone", "timestamptz")) for name, type in found] == promised


def test_there_are_no_other_views(connection: Connection[Any], schema: str) -> None:
    found = connection.execute("SELECT viewname FROM pg_views WHERE schemaname = %s", (schema,)).fetchall()

    assert {name for (name,) in found} == VIEWS.keys()


# --- what is in them --------------------------------------------------------------------------------------------------

ALL_STATUSES = """
INSERT INTO workflow_rows (shard, id, name, queue, created_at)
SELECT 1, ('00000000-0000-0000-0000-00000000000' || n)::uuid, 'work', 'default', now() - interval '1 hour' * n
FROM generate_series(1, 8) AS n;
INSERT INTO checkpoints (shard, workflow_id, key, kind, position, status, payload, created_at)
SELECT shard, id, '$input', 'input', 0, 'success', '{"args": [1]}', created_at FROM workflow_rows;

INSERT INTO queue_entries (shard, workflow_id, queue, name, enqueued_at, worker_id, epoch)
VALUES (1, '00000000-0000-0000-0000-000000000001', 'default', 'work', now(), NULL, 0),
       (1, '00000000-0000-0000-0000-000000000002', 'default', 'work', now(), NULL, 0),
       (1, '00000000-0000-0000-0000-000000000003', 'default', 'work', now(), gen_random_uuid(), 1);
INSERT INTO waits (shard, workflow_id, waiting_for, wake_at, queue, name, enqueued_at, created_at)
VALUES (1, '00000000-0000-0000-0000-000000000004', 'start', now() + interval '1 day', 'default', 'work', now(), now());
INSERT INTO checkpoints (shard, workflow_id, key, kind, position, status, payload, created_at)
VALUES (1, '00000000-0000-0000-0000-000000000005', '$result', 'result', 2147483647, 'success', '5', now()),
       (1, '00000000-0000-0000-0000-000000000006', '$result', 'result', 2147483647, 'error', '{"message": "6"}', now()),
       (1, '00000000-0000-0000-0000-000000000007', '$result', 'result', 2147483647, 'cancelled', '{"message": "7"}',
        now()),
       (1, '00000000-0000-0000-0000-000000000008', '$result', 'result', 2147483647, 'error', '{"message": "8"}',
        now() - interval '2 months'),
       (1, '00000000-0000-0000-0000-000000000005', 'charge', 'step', 1, 'success', '"paid"', now()),
       (1, '00000000-0000-0000-0000-000000000006', 'outer/charge#2', 'step', 1, 'error', '{"message": "no"}', now()),
       (1, '00000000-0000-0000-0000-000000000008', 'charge', 'step', 1, 'error', '{"message": "old"}',
        now() - interval '2 months');
"""


@pytest.fixture
def filled(connection: Connection[Any]) -> Connection[Any]:
    """Two pending workflows, two in error, and one of each other status; three steps, of which one failed lately."""
    connection.execute(ALL_STATUSES)
    return connection


def test_failed_steps_of_a_month_are_found_by_the_query_of_the_first_page(filled: Connection[Any]) -> None:
    cursor = filled.cursor(row_factory=psycopg.rows.dict_row)

    (step,) = cursor.execute(FAILED_STEPS).fetchall()

    assert (step["key"], step["name"], step["output"]) == ("outer/charge#2", "charge", None)
    assert step["error"] == {"message": "no"}


def test_the_oldest_pending_workflows_are_found_by_the_query_of_the_first_page(filled: Connection[Any]) -> None:
    cursor = filled.cursor(row_factory=psycopg.rows.dict_row)

    found = cursor.execute(OLDEST_PENDING).fetchall()

    assert [workflow["id"].int for workflow in found] == [2, 1]
    assert all(workflow["input"] == {"args": [1]} for workflow in found)


def test_every_workflow_is_shown_once_with_its_status_and_its_outcome(filled: Connection[Any]) -> None:
    found = filled.execute("SELECT status, output, error FROM workflows ORDER BY id").fetchall()

    assert found == [
        ("pending", None, None),
        ("pending", None, None),
        ("running", None, None),
        ("waiting", None, None),
        ("success", 5, None),
        ("error", None, {"message": "6"}),
        ("cancelled", None, {"message": "7"}),
        ("error", None, {"message": "8"}),
    ]


def test_the_input_and_the_result_are_no_steps(filled: Connection[Any]) -> None:
    assert filled.execute("SELECT count(*) FROM workflow_steps WHERE key LIKE '$%'").fetchone() == (0,)


def test_a_step_that_runs_is_shown_while_its_run_holds_the_workflow_and_until_it_is_recorded(
    filled: Connection[Any],
) -> None:
    filled.execute(
        "INSERT INTO running_steps (shard, workflow_id, key, worker_id, epoch, attempt, started_at)"
        " SELECT 1, workflow_id, key, worker_id, epoch + stale, 1, now() FROM queue_entries,"
        " (VALUES ('charge', 0), ('refund', 0), ('old', -1)) AS step (key, stale) WHERE worker_id IS NOT NULL"
    )
    filled.execute(
        "INSERT INTO checkpoints (shard, workflow_id, key, kind, position, status, created_at)"
        " SELECT 1, workflow_id, 'refund', 'step', 1, 'success', now() FROM queue_entries WHERE worker_id IS NOT NULL"
    )

    found = filled.execute("SELECT s.key, s.status FROM workflow_steps s JOIN queue_entries USING (workflow_id)")
    assert sorted(found) == [("charge", "running"), ("refund", "success")]


def test_a_worker_whose_lease_ran_out_is_dead_whether_or_not_somebody_noticed(filled: Connection[Any]) -> None:
    filled.execute(
        "INSERT INTO worker_rows (shard, id, status, app, version, host, pid, names, concurrency, lease_seconds,"
        " started_at, heartbeat_at, expires_at, held_since)"
        " SELECT 1, gen_random_uuid(), status, expires, '1', 'here', 1, '[]', 10, 10, now(), now(),"
        " now() + interval '1 second' * expires::int, now()"
        " FROM (VALUES ('live', '-1'), ('live', '100'), ('stopped', '-2'), ('dead', '-3')) AS worker (status, expires)"
    )

    found = filled.execute("SELECT app, status FROM workers ORDER BY app::int")
    assert found.fetchall() == [("-3", "dead"), ("-2", "stopped"), ("-1", "dead"), ("100", "live")]


def test_a_queue_counts_what_is_pending_and_what_is_running(filled: Connection[Any]) -> None:
    filled.execute("INSERT INTO queue_rows (shard, name, created_at) VALUES (1, 'default', now()), (1, 'idle', now())")

    found = filled.execute("SELECT name, pending, running, oldest_pending_at IS NULL FROM queues ORDER BY name")
    assert found.fetchall() == [("default", 2, 1, False), ("idle", 0, 0, True)]


# --- what is read for them --------------------------------------------------------------------------------------------


@pytest.fixture
def tables_of(connection: Connection[Any]) -> Callable[..., tuple[set[str], bool]]:
    """The tables that a query reads for its rows (not for their columns), and whether it has several branches."""

    def explain(query: str, *params: object) -> tuple[set[str], bool]:
        (found,) = connection.execute(f"EXPLAIN (FORMAT JSON) {query}".encode(), params or None).fetchone() or ()
        plan = (found if isinstance(found, list) else json.loads(found))[0]["Plan"]
        nodes = [node for node in _nodes(plan) if "SubPlan" not in node.get("Subplan Name", "")]
        return (
            {node["Relation Name"] for node in nodes if "Relation Name" in node},
            any(node["Node Type"] in ("Append", "Merge Append") for node in nodes),
        )

    return explain


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        if "SubPlan" not in child.get("Subplan Name", ""):
            yield from _nodes(child)


@pytest.mark.parametrize("status", Status)
def test_a_filter_by_status_reads_one_branch_only(
    status: Status, tables_of: Callable[..., tuple[set[str], bool]]
) -> None:
    tables, branches = tables_of(f"SELECT * FROM workflows WHERE status = '{status}' ORDER BY created_at LIMIT 10")

    assert tables == {"workflow_rows", *SOURCES[status]}
    assert not branches


def test_without_a_filter_all_branches_are_read(tables_of: Callable[..., tuple[set[str], bool]]) -> None:
    tables, branches = tables_of("SELECT * FROM workflows")

    assert tables == {"workflow_rows", "queue_entries", "waits", "checkpoints"}
    assert branches


def test_a_status_that_does_not_exist_reads_nothing(tables_of: Callable[..., tuple[set[str], bool]]) -> None:
    assert tables_of("SELECT * FROM workflows WHERE status = 'done'") == (set(), False)


def test_a_status_given_as_a_parameter_reads_one_branch_only(tables_of: Callable[..., tuple[set[str], bool]]) -> None:
    tables, branches = tables_of("SELECT * FROM workflows WHERE status = %s", "waiting")

    assert tables == {"workflow_rows", "waits"}
    assert not branches


def test_failed_steps_are_not_looked_for_among_those_that_run(
    tables_of: Callable[..., tuple[set[str], bool]],
) -> None:
    assert tables_of(FAILED_STEPS.rstrip(";")) == ({"checkpoints"}, False)
