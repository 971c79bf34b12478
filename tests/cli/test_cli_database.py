"""`perdure migrate`, `perdure version`, and what any command says of a database that it can't use."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from processes import Run

from perdure import embedded
from perdure.cli import cli
from perdure.embedded import Cluster
from perdure.store import database, migrations

# --- migrate ----------------------------------------------------------------------------------------------------------


def test_migrate_makes_the_schema_and_does_nothing_the_second_time(run: Run, schema: str) -> None:
    newest = migrations.known()[-1]
    first, second = run("migrate"), run("migrate")
    assert (first.exit_code, second.exit_code) == (0, 0), first.stderr
    assert first.stdout.startswith(f"schema '{schema}': applied 0001_initial")
    assert second.stdout == f"schema '{schema}' is up to date ({newest.version:04d}_{newest.name})\n"


def test_a_dry_run_says_what_is_missing_and_changes_nothing(
    run: Run, schema: str, sql: Callable[..., list[Any]]
) -> None:
    missing = run("migrate", "--dry-run")
    assert (missing.exit_code, missing.stderr) == (1, "")
    assert missing.stdout.startswith(f"schema '{schema}' lacks 0001_initial")
    assert sql("SELECT 1 FROM pg_namespace WHERE nspname = %s", schema) == []

    run("migrate")
    assert run("migrate", "--dry-run").exit_code == 0


def test_what_it_prints_is_what_it_would_do(run: Run, database_url: str, schema: str) -> None:
    printed = run("migrate", "--print", env={"PERDURE_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"})
    assert printed.exit_code == 0
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(printed.stdout.encode())
    assert run("migrate", "--dry-run").exit_code == 0


def test_print_and_dry_run_exclude_each_other(run: Run) -> None:
    assert run("migrate", "--print", "--dry-run").exit_code == 2


def test_migrate_migrates_where_clients_are_told_not_to(run: Run) -> None:
    assert run("migrate", env={"PERDURE_MIGRATE": "off"}).exit_code == 0
    assert run("migrate", "--dry-run").exit_code == 0


def test_a_schema_of_a_newer_perdure_is_one_line(run: Run, schema: str, sql: Callable[..., list[Any]]) -> None:
    run("migrate")
    sql("INSERT INTO migrations SELECT shard, 9999, name, checksum, 9999, now() FROM migrations WHERE version = 1")
    for command in (["migrate"], ["migrate", "--dry-run"], ["workflow", "list"]):
        refused = run(*command)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert refused.stderr.startswith(f"perdure: schema '{schema}' is at version 9999")
        assert refused.stderr.endswith("upgrade perdure\n")
    assert "upgrade perdure" in run("version", "--server").stdout


# --- version ----------------------------------------------------------------------------------------------------------


def test_version_says_what_works_together(run: Run, schema: str) -> None:
    without = json.loads(run("version", "--json", env={"PERDURE_DATABASE_URL": "postgresql://127.0.0.1:1"}).stdout)
    assert set(without) == {"perdure", "python", "psycopg", "migration"}
    found = run("version", "--server").stdout
    assert "\nserver     PostgreSQL 18." in found
    assert f"\nschema     '{schema}' lacks" in found
    run("migrate")
    assert json.loads(run("version", "--server", "--json").stdout)["schema"] == f"'{schema}' is up to date"


# --- a database that can't be used ------------------------------------------------------------------------------------

COMMANDS = [["workflow", "list"], ["workflow", "start", "checkout"], ["migrate"], ["version", "--server"]]


@pytest.fixture(scope="module")
def tcp() -> Iterator[Cluster]:
    """A server that asks for passwords, over TCP."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with embedded.temporary({"listen_addresses": "127.0.0.1", "port": str(port)}) as cluster:
        hba = cluster.directory / "data" / "pg_hba.conf"
        hba.write_text("host perdure clerk 127.0.0.1/32 scram-sha-256\nlocal all all trust\n")
        with psycopg.connect(cluster.url, autocommit=True) as connection:
            connection.execute("CREATE ROLE clerk LOGIN PASSWORD 'hunter2'")
            connection.execute("SELECT pg_reload_conf()")
        yield cluster


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(
    ("account", "message"),
    [
        ("clerk:wrong@", 'password authentication failed for user "clerk"; check user and password'),
        ("clerk@", "no password supplied; check user and password in the database URL"),
        ("other:hunter2@", 'no pg_hba.conf entry for host "127.0.0.1", user "other"'),
    ],
)
def test_a_wrong_password_is_one_line(run: Run, tcp: Cluster, command: list[str], account: str, message: str) -> None:
    refused = run(*command, "--database-url", f"postgresql://{account}127.0.0.1:{tcp.port}/perdure")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr.startswith("perdure: ")
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert "hunter2" not in refused.stderr


@pytest.mark.parametrize("command", [["workflow", "start", "checkout"], ["migrate"]], ids=" ".join)
def test_missing_rights_are_one_line(run: Run, tcp: Cluster, command: list[str]) -> None:
    refused = run(*command, "--database-url", f"postgresql://clerk:hunter2@127.0.0.1:{tcp.port}/perdure")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr.startswith("perdure: permission denied for database perdure; ")
    assert refused.stderr.count("\n") == 1


def test_looking_at_somebody_elses_schema_is_one_line(run: Run, tcp: Cluster) -> None:
    assert run("migrate", "--database-url", tcp.url).exit_code == 0
    url = f"postgresql://clerk:hunter2@127.0.0.1:{tcp.port}/perdure"
    refused = run("workflow", "list", "--database-url", url)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "permission denied for schema" in refused.stderr
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql:/perdure", "the database URL can't be read"),
        ("postgresql://clerk:hunter2@localhost:port/perdure", "check host and port in the database URL"),
        ("postgresql://clerk:hunter2@localhost:99999/perdure", "invalid port number"),
        ("clerk:hunter2@localhost", "use postgresql://user:password@host:5432/database"),
        ("postgres//clerk:hun/ter@hunter2@localhost", "the database URL can't be read"),
        ("password='hunter2", "the database URL can't be read"),
        ("postgresql://clerk:hunter2@no-such-host.invalid/perdure", "check host and port in the database URL"),
    ],
)
def test_a_wrong_url_is_one_line(run: Run, url: str, message: str) -> None:
    refused = run("workflow", "list", "--database-url", url)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr.startswith("perdure: ")
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert "hunter2" not in refused.stderr


def test_a_database_that_isnt_there_is_one_line(run: Run, cluster: Cluster) -> None:
    refused = run("migrate", "--database-url", cluster.url.replace("/perdure?", "/nowhere?"))
    assert refused.exit_code == 2
    assert 'database "nowhere" does not exist; create it, or correct the database URL' in refused.stderr


def test_a_server_that_gives_no_answer_is_exit_code_3(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perdure.cli.options.PATIENCE", timedelta(0))
    refused = run("workflow", "list", "--database-url", "postgresql://perdure@127.0.0.1:1/perdure")
    assert (refused.exit_code, refused.stdout) == (3, "")
    assert refused.stderr.startswith("perdure: the database can't be reached: ")
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_server_that_is_too_old_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.setattr(database, "OLDEST_SERVER", 990_000)
    refused = run(*command)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr == "perdure: the server is PostgreSQL 18; perdure needs 13 or later\n"


def test_no_database_at_all_says_what_to_set(run: Run) -> None:
    refused = run("workflow", "list", env={"PERDURE_DATABASE_URL": None, "PERDURE_EMBEDDED": "off"})
    assert refused.exit_code == 2
    assert "set PERDURE_DATABASE_URL=postgresql://..." in refused.stderr


# --- where the database is named --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--schema", "S", "workflow", "--schema", "other", "list"],
        ["workflow", "--schema", "S", "list"],
        ["workflow", "list", "--schema", "S"],
    ],
)
def test_the_innermost_option_wins_over_the_environment(run: Run, arguments: list[str]) -> None:
    name = f"test_{uuid4().hex[:12]}"
    given = [name if argument == "S" else argument for argument in arguments]
    expected = "other" if "other" in given else name
    assert f"perdure: schema '{expected}' lacks" in run(*given).stderr


# --- help -------------------------------------------------------------------------------------------------------------


def commands() -> Iterator[list[str]]:
    """All commands but those that others test."""
    for name, lazy in cli.later.items():
        if name in ("demo", "postgres"):
            continue
        yield [name]
        for inner in getattr(lazy.load(), "commands", ()):
            yield [name, inner]


@pytest.mark.parametrize("command", [[], *commands()], ids=" ".join)
def test_every_help_has_an_example(run: Run, command: list[str]) -> None:
    helped = run(*command, "--help")
    assert helped.exit_code == 0
    assert "Example" in helped.stdout
    assert f"  perdure {' '.join(command)}" in helped.stdout
    assert all(option.help for option in _options(command)), "an option without a text"


def _options(command: list[str]) -> list[Any]:
    found: Any = cli
    for name in command:
        found = found.later[name].load() if found is cli else found.commands[name]
    return [param for param in found.params if param.param_type_name == "option" and not param.hidden]


def test_the_summary_in_the_list_of_commands_is_that_of_the_command(run: Run) -> None:
    listed = run("--help").stdout
    for name, lazy in cli.later.items():
        assert f"  {name}" in listed
        if name not in ("demo", "postgres"):
            assert (lazy.load().help or "").startswith(lazy.summary)
