"""`perdure demo`, as a user runs it: a process of its own, with workers that are processes of theirs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import psycopg
import pytest
from click.testing import CliRunner

from perdure.cli.demo import demo
from perdure.demo.proof import Outcome
from perdure.demo.stage import SCHEMA

COMMAND = [sys.executable, "-c", "from perdure.cli.demo import demo; demo(prog_name='perdure demo')"]
FILES = 200


@pytest.fixture(autouse=True)
def no_schema(database_url: str) -> Iterator[None]:
    """The server is shared with other tests: no demo was there before, and none is left."""
    yield
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE")


def run(database_url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "--database-url", database_url, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def fetch(database_url: str, text: str) -> list[tuple[object, ...]]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        return connection.execute(text.encode()).fetchall()


def test_a_killed_worker_loses_nothing(database_url: str) -> None:
    ran = run(database_url, "--files", str(FILES), "--keep")

    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "killed with SIGKILL" in ran.stdout
    assert "taken over after" in ran.stdout
    assert "SELECT * FROM workflows WHERE status = 'pending' ORDER BY created_at LIMIT 10;" in ran.stdout
    assert "FROM workflow_steps WHERE status = 'error' AND created_at > now() - interval '1 month';" in ran.stdout
    assert "Proven: nothing was lost, and nothing was done twice." in ran.stdout
    assert fetch(database_url, f"SELECT count(*), count(DISTINCT ordinal) FROM {SCHEMA}.results") == [(FILES, FILES)]
    assert fetch(database_url, f"SELECT status, count(*) FROM {SCHEMA}.workflows GROUP BY status") == [
        ("success", FILES)
    ]
    ((recovered,),) = fetch(database_url, f"SELECT count(*) FROM {SCHEMA}.results WHERE attempt > 1")
    assert recovered, "rows were written by workflows that had been taken over"


def test_without_a_kill_nothing_runs_again_and_nothing_is_left_behind(database_url: str) -> None:
    ran = run(database_url, "--files", "20", "--no-kill", "--workers", "1")

    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "none of them ran again" in ran.stdout
    assert "SIGKILL" not in ran.stdout
    assert fetch(database_url, f"SELECT 1 FROM pg_namespace WHERE nspname = '{SCHEMA}'") == []


def test_a_kill_that_hits_nothing_proves_nothing(database_url: str) -> None:
    ran = run(database_url, "--files", "1")

    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "FAILED: nothing was in flight when it was time to kill a worker; use more --files." in ran.stdout
    assert "Proven" not in ran.stdout


def test_ctrl_c_ends_the_workers(database_url: str) -> None:
    command = [*COMMAND, "--database-url", database_url, "--files", "1000", "--no-kill"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if " of 1,000 workflows" in line:
                break
        os.kill(process.pid, signal.SIGINT)
        process.stdout.read()
        assert process.stderr.read() == "stopped; the workers have ended\n"
        assert process.wait(30) == 130
    workers = fetch(database_url, f"SELECT status FROM {SCHEMA}.workers")
    assert workers == [("stopped",), ("stopped",)]


def test_it_drops_no_schema_but_its_own(database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {SCHEMA}")
        connection.execute(f"CREATE TABLE {SCHEMA}.precious (id int4)")

    ran = run(database_url, "--files", "20")

    assert ran.returncode != 0
    assert f"schema {SCHEMA!r} is there, and no demo has made it" in ran.stderr
    assert fetch(database_url, f"SELECT count(*) FROM {SCHEMA}.precious") == [(0,)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "1"], "nobody could take over from a single worker"),
        (["--files", "0"], "0 is not in the range x>=1"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(demo, arguments)

    assert result.exit_code == 2
    assert message in result.output


def outcome(**changes: int | None) -> Outcome:
    whole: dict[str, int | None] = {
        "files": 10, "rows": 10, "ordinals": 10, "successes": 10, "checkpoints": 40, "began": 40, "again": 3,
        "elsewhere": 0, "in_flight": 4, "taken_over": 4,
    }  # fmt: skip
    return Outcome(**{**whole, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rows": 9, "ordinals": 9}, "9 rows of results stand for 9 of 10 files"),
        ({"rows": 11}, "11 rows of results stand for 10 of 10 files"),
        ({"successes": 9}, "9 of 10 workflows ended in success"),
        ({"checkpoints": 41}, "41 steps are recorded, but 40 began"),
        ({"in_flight": 0, "taken_over": 0}, "nothing was in flight"),
        ({"taken_over": 0}, "nobody has taken over"),
    ],
)
def test_the_judgement_sees_what_is_wrong(changes: dict[str, int | None], problem: str) -> None:
    assert outcome().problems() == []
    (found,) = outcome(**changes).problems()
    assert found.startswith(problem)
