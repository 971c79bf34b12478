"""Whether the schema is what the migrations make of an empty database, and the DDL that mends it where it isn't.

What should be there is made: in a schema of its own, in a transaction that is rolled back. So both are described by the
same server, in the same words, and there is nothing else to keep up to date. It takes the right to create a schema.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from uuid import uuid4

import psycopg

from perdure.doctor.findings import Finding, Level, note, ok, problem, warning
from perdure.doctor.look import Look
from perdure.errors import SchemaError
from perdure.store import migrations
from perdure.store.statements import in_schema

_ADVICE = "run the statements below as the owner of the schema"
_NAME = "SELECT pg_catalog.quote_ident($1::text) AS name"

_IS_STANDBY = "SELECT pg_catalog.pg_is_in_recovery() AS is_standby"

_COLUMNS = """
SELECT class.relname::text AS parent, attribute.attname::text AS name,
       pg_catalog.format_type(attribute.atttypid, attribute.atttypmod) AS type, attribute.attnotnull AS not_null,
       pg_catalog.pg_get_expr(given.adbin, given.adrelid) AS given
FROM pg_catalog.pg_class AS class
JOIN pg_catalog.pg_attribute AS attribute ON attribute.attrelid = class.oid
LEFT JOIN pg_catalog.pg_attrdef AS given ON given.adrelid = class.oid AND given.adnum = attribute.attnum
WHERE class.relnamespace = pg_catalog.to_regnamespace($1::text) AND class.relkind IN ('r', 'p')
  AND attribute.attnum > 0 AND NOT attribute.attisdropped
ORDER BY class.relname, attribute.attnum
"""

_OPTIONS = """
SELECT class.relname::text AS parent, option.text
FROM pg_catalog.pg_class AS class, unnest(class.reloptions) AS option (text)
WHERE class.relnamespace = pg_catalog.to_regnamespace($1::text) AND class.relkind IN ('r', 'p')
ORDER BY 1, 2
"""

_CONSTRAINTS = """
SELECT class.relname::text AS parent, rule.conname::text AS name, pg_catalog.pg_get_constraintdef(rule.oid) AS text
FROM pg_catalog.pg_constraint AS rule
JOIN pg_catalog.pg_class AS class ON class.oid = rule.conrelid
WHERE class.relnamespace = pg_catalog.to_regnamespace($1::text) AND rule.contype <> 'n'
ORDER BY 1, 2
"""

_INDEXES = """
SELECT class.relname::text AS parent, own.relname::text AS name, pg_catalog.pg_get_indexdef(index.indexrelid) AS text,
       index.indisvalid AND index.indisready AS is_valid,
       EXISTS (SELECT 1 FROM pg_catalog.pg_constraint AS rule
               WHERE rule.conindid = index.indexrelid) AS is_of_constraint
FROM pg_catalog.pg_index AS index
JOIN pg_catalog.pg_class AS class ON class.oid = index.indrelid
JOIN pg_catalog.pg_class AS own ON own.oid = index.indexrelid
WHERE class.relnamespace = pg_catalog.to_regnamespace($1::text) AND class.relkind IN ('r', 'p')
ORDER BY 1, 2
"""

_TRIGGERS = """
SELECT class.relname::text AS parent, trigger.tgname::text AS name
FROM pg_catalog.pg_trigger AS trigger
JOIN pg_catalog.pg_class AS class ON class.oid = trigger.tgrelid
WHERE class.relnamespace = pg_catalog.to_regnamespace($1::text) AND NOT trigger.tgisinternal
ORDER BY 1, 2
"""

_VIEWS = """
SELECT class.relname::text AS name, pg_catalog.pg_get_viewdef(class.oid) AS text
FROM pg_catalog.pg_class AS class
WHERE class.relnamespace = pg_catalog.to_regnamespace($1::text) AND class.relkind = 'v'
ORDER BY class.oid
"""

_FUNCTIONS = """
SELECT own.proname || '(' || pg_catalog.pg_get_function_identity_arguments(own.oid) || ')' AS name,
       pg_catalog.pg_get_functiondef(own.oid) AS text
FROM pg_catalog.pg_proc AS own
WHERE own.pronamespace = pg_catalog.to_regnamespace($1::text) AND own.prokind IN ('f', 'p')
ORDER BY 1
"""


@dataclass(frozen=True, slots=True)
class _Column:
    type: str
    not_null: bool
    given: str | None

    def __str__(self) -> str:
        given = "" if self.given is None else f" DEFAULT {self.given}"
        return f"{self.type}{' NOT NULL' if self.not_null else ''}{given}"


@dataclass(frozen=True, slots=True)
class _Table:
    columns: dict[str, _Column] = field(default_factory=dict[str, _Column])
    options: list[str] = field(default_factory=list[str])
    constraints: dict[str, str] = field(default_factory=dict[str, str])
    indexes: dict[str, str] = field(default_factory=dict[str, str])
    invalid: list[str] = field(default_factory=list[str])
    triggers: list[str] = field(default_factory=list[str])


@dataclass(frozen=True, slots=True)
class _Shape:
    """What stands in a schema; where a text names the schema, it says `perdure.`."""

    tables: dict[str, _Table] = field(default_factory=dict[str, _Table])
    views: dict[str, str] = field(default_factory=dict[str, str])
    functions: dict[str, str] = field(default_factory=dict[str, str])


async def exists(look: Look) -> Sequence[Finding]:
    """Whether all migrations are there: else there is nothing to look at."""
    try:
        missing = await migrations.pending(look.connection, look.schema)
    except SchemaError as error:
        return [problem("schema", str(error), "see what the text says")]
    except psycopg.errors.InsufficientPrivilege:
        return []  # what it lacks is said with the rights
    if missing == migrations.known():
        return [problem("schema", f"there is no schema {look.schema!r} of perdure here", "run 'perdure migrate'")]
    if missing:
        names = ", ".join(f"{each.version:04d}_{each.name}" for each in missing)
        return [problem("schema", f"schema {look.schema!r} lacks migration {names}", "run 'perdure migrate'")]
    return []


async def schema(look: Look) -> Sequence[Finding]:
    """Whether nothing was changed behind the back of the migrations."""
    (server,) = await look.rows(_IS_STANDBY)
    if server.is_standby:
        return [note("schema", "a standby can't make what to compare the schema with", "look at the primary")]
    try:
        there, wanted = await _both(look)
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.ReadOnlySqlTransaction):
        advice = "run this as a role that may CREATE in the database (what it makes is rolled back)"
        return [note("schema", "what to compare the schema with can't be made by this role", advice)]
    findings = [
        Finding(
            check="schema",
            level=each.level,
            text=each.text,
            advice=each.advice,
            sql=tuple(in_schema(sql, look.schema).replace('perdure."', f'{look.quoted}."') for sql in each.sql),
        )
        for each in _differences(there, wanted)
    ]
    newest = migrations.known()[-1]
    return findings or [ok("schema", f"schema {look.schema!r} is as {newest.version:04d}_{newest.name} made it")]


async def _both(look: Look) -> tuple[_Shape, _Shape]:
    """What is there, and what would be."""
    name = f"perdure_doctor_{uuid4().hex}"
    async with look.connection.transaction(force_rollback=True):
        await _run(look, "SET LOCAL search_path = pg_catalog")  # so that every name is written out
        (own,) = await look.rows(_NAME, look.schema)
        there = await _shape(look, own.name)
        await _run(look, migrations.body(name))
        return there, await _shape(look, name)


async def _run(look: Look, text: str) -> None:
    await look.connection.cursor(binary=False).execute(text.encode(), prepare=False)


async def _shape(look: Look, name: str) -> _Shape:
    def plain(text: str) -> str:
        return text.replace(f"{name}.", "perdure.")

    found = _Shape()
    for row in await look.rows(_COLUMNS, name):
        table = found.tables.setdefault(row.parent, _Table())
        table.columns[row.name] = _Column(row.type, row.not_null, None if row.given is None else plain(row.given))
    for row in await look.rows(_OPTIONS, name):
        found.tables[row.parent].options.append(row.text)
    for row in await look.rows(_CONSTRAINTS, name):
        found.tables[row.parent].constraints[row.name] = plain(row.text)
    for row in await look.rows(_INDEXES, name):
        table = found.tables[row.parent]
        if not row.is_of_constraint:
            table.indexes[row.name] = plain(row.text)
        if not row.is_valid:
            table.invalid.append(row.name)
    for row in await look.rows(_TRIGGERS, name):
        if row.parent in found.tables:
            found.tables[row.parent].triggers.append(row.name)
    for row in await look.rows(_VIEWS, name):
        found.views[row.name] = plain(row.text)
    for row in await look.rows(_FUNCTIONS, name):
        found.functions[row.name] = plain(row.text)
    return found


def _differences(there: _Shape, wanted: _Shape) -> Iterator[Finding]:
    """In the order in which they can be mended."""
    for name, text in wanted.functions.items():
        if there.functions.get(name) != text:
            yield problem("schema", f"function {name} {_is(name in there.functions)}", _ADVICE, text.strip())
    for name, table in wanted.tables.items():
        if name not in there.tables:
            yield problem(
                "schema", f"table {name} is missing, with all that was in it", _ADVICE, *_created(name, table)
            )
        else:
            yield from _of_table(name, there.tables[name], table)
    for name, text in wanted.views.items():
        if there.views.get(name) != text:
            create = _as_written(name)
            drop = (f'DROP VIEW perdure."{name}"',) if name in there.views else ()
            advice = _ADVICE + ", and grant again what was granted on it"
            yield problem("schema", f"view {name} {_is(name in there.views)}", advice, *drop, create)


def _as_written(view: str) -> str:
    """The statement that makes a view: what the server says of it is another view, once it is made again."""
    pattern = re.compile(rf"^CREATE (?:OR REPLACE )?VIEW perdure\.{view} AS\n.*?;$", re.MULTILINE | re.DOTALL)
    *_, last = (found[0] for migration in migrations.known() for found in pattern.finditer(migration.text))
    return last.rstrip(";")


def _is(is_there: bool) -> str:
    return "isn't what it should be" if is_there else "is missing"


def _created(name: str, table: _Table) -> Iterator[str]:
    lines = [f'"{column}" {declared}' for column, declared in table.columns.items()]
    lines += [f'CONSTRAINT "{rule}" {text}' for rule, text in table.constraints.items()]
    options = f" WITH ({', '.join(table.options)})" if table.options else ""
    body = ",\n    ".join(lines)
    yield f'CREATE TABLE perdure."{name}" (\n    {body}\n){options}'
    yield from table.indexes.values()


def _of_table(name: str, there: _Table, wanted: _Table) -> Iterator[Finding]:
    alter = f'ALTER TABLE perdure."{name}"'
    for column, declared in wanted.columns.items():
        found = there.columns.get(column)
        if found is None:
            sql = f'{alter} ADD COLUMN "{column}" {declared}'
            yield problem("schema", f"column {column} of table {name} is missing", _ADVICE, sql)
        elif found != declared:
            text = f"column {column} of table {name} is {found}, not {declared}"
            yield problem("schema", text, _ADVICE, *_altered(alter, column, found, declared))
    for rule, text in wanted.constraints.items():
        if there.constraints.get(rule) != text:
            drop = (f'{alter} DROP CONSTRAINT "{rule}"',) if rule in there.constraints else ()
            add = f'{alter} ADD CONSTRAINT "{rule}" {text}'
            says = f"constraint {rule} of table {name} {_is(rule in there.constraints)}"
            yield problem("schema", says, _ADVICE, *drop, add)
    for index, text in wanted.indexes.items():
        if there.indexes.get(index) != text:
            drop = (f'DROP INDEX perdure."{index}"',) if index in there.indexes else ()
            create = text.replace(" INDEX ", " INDEX CONCURRENTLY ", 1)
            says = f"index {index} on table {name} {_is(index in there.indexes)}"
            yield problem("schema", says, _ADVICE, *drop, create)
    for index in there.invalid:
        says = f"index {index} on table {name} is invalid: nothing uses it, and each write pays for it"
        yield problem("schema", says, _ADVICE, f'REINDEX INDEX CONCURRENTLY perdure."{index}"')
    yield from _additions(name, there, wanted)


def _altered(alter: str, column: str, found: _Column, wanted: _Column) -> Iterator[str]:
    if found.type != wanted.type:
        yield f'{alter} ALTER COLUMN "{column}" TYPE {wanted.type} USING "{column}"::{wanted.type}'
    if found.given != wanted.given:
        given = "DROP DEFAULT" if wanted.given is None else f"SET DEFAULT {wanted.given}"
        yield f'{alter} ALTER COLUMN "{column}" {given}'
    if found.not_null != wanted.not_null:
        yield f'{alter} ALTER COLUMN "{column}" {"SET" if wanted.not_null else "DROP"} NOT NULL'


def _additions(name: str, there: _Table, wanted: _Table) -> Iterator[Finding]:
    """What isn't perdure's, on one of its tables."""
    for column in there.columns.keys() - wanted.columns.keys():
        declared = there.columns[column]
        if declared.not_null and declared.given is None:
            text = f"column {column} of table {name} isn't perdure's, and it takes no row without it"
            yield problem(
                "schema", text, _ADVICE, f'ALTER TABLE perdure."{name}" ALTER COLUMN "{column}" DROP NOT NULL'
            )
        else:
            yield note("schema", f"column {column} of table {name} isn't perdure's")
    for rule in there.constraints.keys() - wanted.constraints.keys():
        advice = "drop it, unless you are certain that it never refuses what perdure writes"
        sql = f'ALTER TABLE perdure."{name}" DROP CONSTRAINT "{rule}"'
        yield warning("schema", f"constraint {rule} of table {name} isn't perdure's", advice, sql)
    for index in there.indexes.keys() - wanted.indexes.keys():
        yield note("schema", f"index {index} on table {name} isn't perdure's; each write pays for it")
    for trigger in there.triggers:
        advice = "drop it, unless you are certain that it never fails and is quick: it runs in each flush"
        sql = f'DROP TRIGGER "{trigger}" ON perdure."{name}"'
        yield warning("schema", f"table {name} has a trigger, {trigger}", advice, sql)
    if sorted(there.options) != sorted(wanted.options):
        now, then = (", ".join(options) or "none" for options in (there.options, wanted.options))
        text = f"storage parameters of table {name} are {now}; perdure sets {then}"
        yield Finding(check="schema", level=Level.NOTE, text=text, advice="this is right if somebody tuned them")
