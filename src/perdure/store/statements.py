"""The SQL of perdure: `.sql` files with named statements, loaded once for a schema.

A file holds blocks that begin with `-- :name NAME`; parameters are `$1`, `$2`, ... The text runs in psql as it stands:
the only change that is ever made to it is the name of the schema.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources

DEFAULT_SCHEMA = "perdure"
SHARD = 1
"""One shard for now; it stands in every key and every statement, so that there can be more."""

_NAME = re.compile(r"^-- :name (\w+)\n", re.MULTILINE)
_SCHEMA = re.compile(r"\bperdure\.(?=\w)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """One named statement, as bytes for the driver."""

    name: str
    text: bytes

    def __repr__(self) -> str:
        return f"<statement {self.name}>"


class Statements:
    """All statements for one schema, by name: `statements["claim"]`."""

    def __init__(self, schema: str = DEFAULT_SCHEMA, package: str = "perdure.store") -> None:
        self.schema = schema
        self._by_name = {
            name: Statement(name=name, text=in_schema(text, schema).encode()) for name, text in _texts(package).items()
        }

    def __getitem__(self, name: str) -> Statement:
        return self._by_name[name]

    def __iter__(self) -> Iterator[Statement]:
        return iter(self._by_name.values())


@cache
def statements(schema: str = DEFAULT_SCHEMA) -> Statements:
    """The statements for `schema`: loaded at its first use."""
    return Statements(schema)


def in_schema(sql: str, schema: str) -> str:
    """The text with `perdure.` replaced by the quoted name of the schema."""
    if schema == DEFAULT_SCHEMA:
        return sql
    return _SCHEMA.sub(lambda _: f"{quoted(schema)}.", sql)


def quoted(name: str) -> str:
    """A name, as SQL has it."""
    return '"' + name.replace('"', '""') + '"'


@cache
def _texts(package: str) -> dict[str, str]:
    texts: dict[str, str] = {}
    for file in sorted(resources.files(package).joinpath("sql").iterdir(), key=lambda file: file.name):
        if not file.name.endswith(".sql"):
            continue
        _, *parts = _NAME.split(file.read_text(encoding="utf-8"))
        for name, text in zip(parts[::2], parts[1::2], strict=True):
            assert name not in texts, f"two statements are named {name}"
            texts[name] = text.strip().rstrip(";")
    return texts
