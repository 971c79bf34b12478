"""`perdure doctor` on the command line; what it finds is tested in tests/doctor."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from processes import Run

Sql = Callable[..., list[Any]]


@pytest.fixture(autouse=True)
def careful(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's server has fsync off, which is a problem of its own."""
    monkeypatch.setattr("perdure.doctor.way._DURABLE", ("full_page_writes",))


def test_a_healthy_installation_is_told_line_by_line(run: Run) -> None:
    run("migrate")
    told = run("doctor")
    assert (told.exit_code, told.stderr) == (0, "")
    assert told.stdout.splitlines()[-1] == "nothing is wrong"
    assert [line.split()[1] for line in told.stdout.splitlines() if line.startswith("ok")][:3] == [
        "server",
        "latency",
        "clock",
    ]
    assert run("doctor", "--quiet").stdout == "nothing is wrong\n"


def test_a_problem_has_its_exit_code_and_its_sql(run: Run, sql: Sql, schema: str) -> None:
    run("migrate")
    sql("DROP INDEX waits_due")
    told = run("doctor", "--quiet")
    assert told.exit_code == 1
    first, advice, statement, summary = told.stdout.splitlines()
    assert first == "problem  schema     index waits_due on table waits is missing"
    assert advice.strip() == "run the statements below as the owner of the schema"
    assert statement.strip().startswith("CREATE INDEX CONCURRENTLY waits_due ON ")
    assert summary == "1 problem"

    found = json.loads(run("doctor", "--json").stdout)
    assert found["healthy"] is False
    (problem,) = [each for each in found["findings"] if each["level"] == "problem"]
    assert problem["check"] == "schema"
    for text in problem["sql"]:
        sql(text)
    assert run("doctor").exit_code == 0


def test_warnings_fail_where_it_is_strict(run: Run, sql: Sql) -> None:
    run("migrate")
    sql("ALTER TABLE waits ADD CONSTRAINT mine CHECK (priority < 100)")
    assert run("doctor").exit_code == 0
    strict = run("doctor", "--strict", "--quiet")
    assert (strict.exit_code, strict.stdout.splitlines()[-1]) == (1, "1 warning")


def test_it_makes_nothing(run: Run, sql: Sql, schema: str) -> None:
    told = run("doctor", "--quiet")
    assert told.exit_code == 1
    assert f"there is no schema '{schema}' of perdure here" in told.stdout
    assert sql("SELECT 1 FROM pg_namespace WHERE nspname = %s OR nspname LIKE 'perdure_doctor%%'", schema) == []


def test_a_server_that_is_not_there_is_a_problem_and_shows_no_password(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = psycopg.conninfo.make_conninfo(host="127.0.0.1", port=1, user="jo", password="secret")
    told = run("doctor", env={"PERDURE_DATABASE_URL": url})
    assert (told.exit_code, "secret" in told.stdout + told.stderr) == (1, False)
    assert told.stdout.startswith("problem  server ")
