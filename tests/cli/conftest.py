"""What tests of the command line share: `perdure` in this process or in one of its own, and an app for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from processes import PERDURE, Process, Run, Spawn

from perdure.cli import cli

UNSET = ("PERDURE_DATABASE_URL", "PERDURE_SCHEMA", "PERDURE_MIGRATE", "PERDURE_EMBEDDED", "NO_COLOR", "PYTHONPATH")


@pytest.fixture
def environment(database_url: str, schema: str) -> dict[str, str]:
    """The variables of a process that works on the schema of the test."""
    kept = {name: value for name, value in os.environ.items() if name not in UNSET}
    return kept | {"PERDURE_DATABASE_URL": database_url, "PERDURE_SCHEMA": schema}


@pytest.fixture
def spawn(tmp_path: Path, environment: dict[str, str]) -> Iterator[Spawn]:
    """Run `perdure ARGUMENTS` in a process of its own, in a folder of its own."""
    processes: list[Process] = []

    def spawn(*arguments: str, env: dict[str, str] | None = None) -> Process:
        process = Process([PERDURE, *arguments], tmp_path, environment | (env or {}))
        processes.append(process)
        return process

    yield spawn
    for process in processes:
        process.close()


@pytest.fixture
def run(database_url: str, schema: str) -> Run:
    """Run `perdure ARGUMENTS` in this process."""

    def run(*arguments: str, env: dict[str, str | None] | None = None, input: str | None = None) -> Result:
        variables: dict[str, str | None] = dict.fromkeys(UNSET)
        variables |= {"PERDURE_DATABASE_URL": database_url, "PERDURE_SCHEMA": schema, **(env or {})}
        return CliRunner().invoke(cli, arguments, env=variables, input=input, prog_name="perdure")

    return run
