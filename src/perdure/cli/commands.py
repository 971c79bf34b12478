"""The group of all commands: imports one when it is called, and ends each in order."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click

from perdure.cli.endings import INTERRUPTED, Failure
from perdure.errors import PerdureError


@dataclass(frozen=True, slots=True)
class Lazy:
    """A command that isn't imported yet.

    Attributes:
        path: Where it is, as `module:attribute`.
        summary: Its line in the list of commands.
    """

    path: str
    summary: str

    def load(self) -> click.Command:
        module, _, attribute = self.path.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


class Commands(click.Group):
    """A group of lazy commands. What perdure raises on purpose becomes one line and an exit code."""

    def __init__(self, *args: Any, later: Mapping[str, Lazy], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.later = later

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for given in args:
            try:
                given.encode()
            except UnicodeEncodeError:
                raise click.UsageError(f"{given!r} isn't valid UTF-8; PostgreSQL stores nothing else", ctx) from None
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.later)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = self.later.get(cmd_name)
        return found.load() if found is not None else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.later[name].summary) for name in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> Any:
        # It warns of statements that are cancelled, as some are at every end; what matters perdure tells by itself.
        logging.getLogger("psycopg").setLevel(logging.ERROR)
        try:
            return super().invoke(ctx)
        except PerdureError as error:
            raise Failure.of(error) from error
        except KeyboardInterrupt:
            raise click.exceptions.Exit(INTERRUPTED) from None
        except Exception as error:
            if getattr(error, "sqlstate", None) is None:
                raise
            raise Failure(f"the database refuses that, or holds what it can't show: {error}") from error
