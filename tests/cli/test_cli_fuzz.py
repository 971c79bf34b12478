"""Any arguments: an answer or one clear sentence, never a traceback."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import click
import pytest
from processes import Run

from perdure import App, Invocation
from perdure.cli import cli

ROUNDS = 40
ROUNDS_OF = {("doctor",): 8}  # each of them looks at a whole server
LEFT_OUT = {"demo", "worker", "postgres", "stream"}  # they start servers, or go on until they are stopped
NOT_GIVEN = {"--database-url", "--against", "--schema", "--output", "--wait"}  # other servers, files, for ever
WORDS = (
    "", " ", "-", "--", "-1", "0", "1", "7", "99999999999999999999", "nan", "1e999", "inf", "true", "null", "é",
    "\udcff", "\u202e", "'; DROP TABLE workflows; --", '"', "%s", "$1", "{}", "[1", '{"a":1}', "a=b", "=", "a=[",
    "x" * 5000, "2026-13-45", "2026-01-01", "0001-01-01", "9999-12-31T23:59:59Z", "infinity", "1d", "-1d", "P1Y",
    "pending", "error", "nonsense", "os:system", "no_such_module:app", "json", "flow", "/nowhere",
    "00000000-0000-0000-0000-000000000000",
)  # fmt: skip


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group) and name not in LEFT_OUT:
            yield from commands(command, (*path, name))
        elif command is not None and name not in LEFT_OUT:
            yield (*path, name), command


COMMANDS = dict(commands(cli))
assert len(COMMANDS) > 15


def arguments(command: click.Command, chance: Random, ids: list[str]) -> list[str]:
    """Some of its options, with some values, and some words."""
    words = (*WORDS, *ids)
    given: list[str] = []
    options = [each for each in command.params if isinstance(each, click.Option) and not NOT_GIVEN & {*each.opts}]
    for option in chance.sample(options, k=chance.randint(0, min(3, len(options)))):
        given.append(option.opts[-1])
        if not option.is_flag:
            given.append(chance.choice(words))
    places = sum(isinstance(each, click.Argument) for each in command.params)
    for _ in range(chance.choice((places, places, places + 1, 0))):
        given.insert(chance.randint(0, len(given)), chance.choice(words))
    return given


@pytest.mark.parametrize("command", ["list", "show"])
def test_json_that_the_database_does_not_show_is_told_in_one_line(
    run: Run, sql: Callable[..., list[Any]], database_url: str, schema: str, command: str
) -> None:
    """`json` takes it, and `jsonb`, as which it is shown, doesn't: somebody has written it past perdure."""

    async def start() -> str:
        async with App("tests", database_url=database_url, schema=schema) as app:
            return str((await app.start(Invocation("flow"), attributes={"a": 1})).id)

    id = asyncio.run(start())
    sql('UPDATE workflow_rows SET attributes = $${"a": "\\u0000"}$$::json')
    told = run("workflow", command, *([] if command == "list" else [id]))
    assert told.exit_code == 1
    assert re.fullmatch(r"perdure: the database refuses that.* \\u0000 cannot be converted to text.*\n", told.stderr)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_any_arguments(
    run: Run, path: tuple[str, ...], database_url: str, schema: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    async def start() -> list[str]:
        async with App("tests", database_url=database_url, schema=schema) as app:
            return [str((await app.start(Invocation("flow", each))).id) for each in range(2)]

    ids = asyncio.run(start())
    chance = Random(" ".join(path))
    for _ in range(ROUNDS_OF.get(path, ROUNDS)):
        given = arguments(COMMANDS[path], chance, ids)
        told = run(*path, *given, input="n\n")
        assert told.exception is None or isinstance(told.exception, SystemExit), (given, told.exception)
        assert "Traceback" not in told.output, (given, told.output)
        assert told.exit_code == 0 or told.output.strip(), f"{given} failed, and nothing was said"
