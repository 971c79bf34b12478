"""How a command ends: with which exit code, and which line on stderr. The codes stand in `perdure --help`."""

from __future__ import annotations

import re
from typing import IO, Any, Self

import click

from perdure.errors import (
    ConfigurationError,
    DatabaseUnavailable,
    DuplicateName,
    InvalidArguments,
    PerdureError,
    ResultTimeout,
)
from perdure.model.keys import InvalidName

FAILED = 1
MISCONFIGURED = 2
UNAVAILABLE = 3
NOT_YET = 4
INTERRUPTED = 130

_CODES: dict[type[PerdureError], int] = {
    ConfigurationError: MISCONFIGURED,
    DuplicateName: MISCONFIGURED,
    InvalidArguments: MISCONFIGURED,
    InvalidName: MISCONFIGURED,
    DatabaseUnavailable: UNAVAILABLE,
    ResultTimeout: NOT_YET,
}

# libpq quotes what it can't read, and a password may stand in it: `//user:...@`, `"user:...@`, `password=...`.
_PASSWORD = re.compile(r"""((?://|["'\s])[^\s:"'/@]+:)(?!//|password@)[^\s"']+(?=@)|(password=)(?:'[^']*'|[^\s&"']+)""")


class Failure(click.ClickException):
    """The end of a command: one line on stderr, and an exit code."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]

    @classmethod
    def of(cls, error: PerdureError) -> Self:
        """The end that belongs to one of perdure's errors."""
        code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), FAILED)
        return cls(str(error), code)

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"perdure: {without_password(' '.join(self.message.split()))}", file=file, err=True)


def without_password(text: str) -> str:
    """The text with `***` where a URL or a conninfo string in it shows a password."""
    return _PASSWORD.sub(r"\1\2***", text)
