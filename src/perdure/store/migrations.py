"""The schema and its versions: forward only, each migration in one transaction, one migrator at a time.

Who migrates locks a row of `migrations` (not an advisory lock: a pooler would lose it), reads what was applied in that
same transaction, and applies the rest; all of it commits together, so a process that dies in the middle leaves nothing.
Each migration names the oldest code that can still work on it (`-- :oldest-code N`, N being the number of the newest
migration that the code knows): older code gets a clear error, any other runs on, so deploys can roll.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import psycopg
from psycopg import AsyncConnection
from psycopg.rows import tuple_row

from perdure.errors import SchemaError
from perdure.store.statements import SHARD, in_schema, quoted

_OLDEST_CODE = re.compile(r"^-- :oldest-code (\d+)$", re.MULTILINE)

_TABLE = """
CREATE TABLE IF NOT EXISTS perdure.migrations (
    shard int4 NOT NULL,
    version int4 NOT NULL,
    name text NOT NULL,
    checksum text NOT NULL,
    oldest_code int4 NOT NULL,
    applied_at timestamptz NOT NULL,
    PRIMARY KEY (shard, version)
);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """One step of the schema: `0001_initial.sql` is version 1, `initial`."""

    version: int
    name: str
    text: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @property
    def oldest_code(self) -> int:
        found = _OLDEST_CODE.search(self.text)
        return int(found[1]) if found else self.version


@cache
def known() -> tuple[Migration, ...]:
    """All migrations that this code knows, in order."""
    folder = resources.files("perdure.store").joinpath("sql", "migrations")
    found: list[Migration] = []
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".sql"):
            number, _, name = file.name.removesuffix(".sql").partition("_")
            found.append(Migration(version=int(number), name=name, text=file.read_text(encoding="utf-8")))
    return tuple(found)


def script(schema: str, migrations: tuple[Migration, ...] | None = None) -> str:
    """What `migrate` would run on an empty database, as SQL for psql."""
    return f"BEGIN;\n\n{body(schema, migrations)}\n\nCOMMIT;\n"


def body(schema: str, migrations: tuple[Migration, ...] | None = None) -> str:
    """The same, for a transaction that the caller has begun."""
    blocks = [f"CREATE SCHEMA IF NOT EXISTS {quoted(schema)};", in_schema(_TABLE, schema).strip()]
    for migration in known() if migrations is None else migrations:
        blocks.append(f"-- {migration.version:04d} {migration.name}\n{in_schema(migration.text, schema).strip()}")
        blocks.append(
            in_schema(
                "INSERT INTO perdure.migrations (shard, version, name, checksum, oldest_code, applied_at)\n"
                f"VALUES ({SHARD}, {migration.version}, '{migration.name}', '{migration.checksum}', "
                f"{migration.oldest_code}, perdure.now());",
                schema,
            )
        )
    return "\n\n".join(blocks)


async def pending(connection: AsyncConnection[Any], schema: str) -> tuple[Migration, ...]:
    """The migrations that the database lacks.

    Raises:
        SchemaError: The schema isn't one that this code can bring up to date or work on.
    """
    return _missing(await _applied(connection, schema), schema)


async def ensure(connection: AsyncConnection[Any], schema: str, *, apply: bool) -> tuple[Migration, ...]:
    """Bring the schema up to date, or check that it is; returns what was applied.

    Raises:
        SchemaError: As for `pending`; or something is missing and `apply` is false.
    """
    missing = await pending(connection, schema)
    if not missing:
        return ()
    if not apply:
        names = ", ".join(f"{migration.version:04d}_{migration.name}" for migration in missing)
        raise SchemaError(f"schema {schema!r} lacks {names}; run 'perdure migrate'")
    return await migrate(connection, schema)


async def migrate(connection: AsyncConnection[Any], schema: str) -> tuple[Migration, ...]:
    """Apply what is missing, in one transaction; whoever comes second finds it done."""
    while True:
        try:
            async with connection.transaction():
                await _bootstrap(connection, schema)
            break
        except (psycopg.errors.UniqueViolation, psycopg.errors.DuplicateTable, psycopg.errors.DuplicateSchema):
            continue  # IF NOT EXISTS isn't atomic: somebody else made it in this moment
    async with connection.transaction():
        await _run(
            connection,
            in_schema(
                "INSERT INTO perdure.migrations (shard, version, name, checksum, oldest_code, applied_at) "
                f"VALUES ({SHARD}, 0, 'lock', '', 0, now()) ON CONFLICT (shard, version) DO NOTHING",
                schema,
            ),
        )
        await _run(
            connection,
            in_schema(
                f"SELECT version FROM perdure.migrations WHERE shard = {SHARD} AND version = 0 FOR UPDATE", schema
            ),
        )
        missing = _missing(await _applied(connection, schema), schema)
        for migration in missing:
            await _run(connection, in_schema(migration.text, schema))
            await _run(
                connection,
                in_schema(
                    "INSERT INTO perdure.migrations (shard, version, name, checksum, oldest_code, applied_at) VALUES "
                    f"({SHARD}, {migration.version}, '{migration.name}', '{migration.checksum}', "
                    f"{migration.oldest_code}, perdure.now())",
                    schema,
                ),
            )
    return missing


async def _bootstrap(connection: AsyncConnection[Any], schema: str) -> None:
    """Make the schema and the table of migrations, where they aren't there: looking needs no right to create."""
    cursor = connection.cursor(row_factory=tuple_row)
    names = (quoted(schema), f"{quoted(schema)}.migrations")
    text = "SELECT pg_catalog.to_regnamespace($1::text) IS NULL, pg_catalog.to_regclass($2::text) IS NULL"
    await cursor.execute(text, names, prepare=False)
    for is_missing, create in zip(
        await cursor.fetchone() or (), (f"CREATE SCHEMA {quoted(schema)}", in_schema(_TABLE, schema)), strict=True
    ):
        if is_missing:
            await _run(connection, create)


async def _run(connection: AsyncConnection[Any], text: str) -> None:
    """Run a text of several statements: without parameters and in text format, so by the simple protocol."""
    await connection.cursor(binary=False).execute(text.encode(), prepare=False)


async def _applied(connection: AsyncConnection[Any], schema: str) -> dict[int, tuple[str, int]] | None:
    """version -> (checksum, oldest code); None: there is no table of migrations."""
    cursor = connection.cursor(row_factory=tuple_row)
    table = f"{quoted(schema)}.migrations"
    await cursor.execute("SELECT pg_catalog.to_regclass($1::text) IS NOT NULL", (table,), prepare=False)
    found = await cursor.fetchone()
    if found is None or not found[0]:
        return None
    await cursor.execute(
        in_schema(
            f"SELECT version, checksum, oldest_code FROM perdure.migrations WHERE shard = {SHARD} AND version > 0",
            schema,
        ).encode(),
        prepare=False,
    )
    return {version: (checksum, oldest) for version, checksum, oldest in await cursor.fetchall()}


def _missing(applied: dict[int, tuple[str, int]] | None, schema: str) -> tuple[Migration, ...]:
    if not applied:
        return known()
    newest = known()[-1].version
    oldest_code = max(oldest for _, oldest in applied.values())
    if oldest_code > newest:
        raise SchemaError(
            f"schema {schema!r} is at version {max(applied)}, which needs perdure's migration {oldest_code}, "
            f"but this one knows only {newest}; upgrade perdure"
        )
    missing = [migration for migration in known() if migration.version not in applied]
    if len(missing) > 0 and missing[0].version < max(applied):
        raise SchemaError(
            f"schema {schema!r} is half-migrated: version {missing[0].version} is missing below {max(applied)}; "
            "restore the table of migrations, or use another schema"
        )
    for migration in known():
        if migration.version in applied and applied[migration.version][0] != migration.checksum:
            raise SchemaError(
                f"schema {schema!r} was made by another version of {migration.version:04d}_{migration.name}; "
                "use the perdure that made it, or another schema"
            )
    return tuple(missing)
