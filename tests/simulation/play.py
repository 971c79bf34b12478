"""Plays many seeds, in several processes."""

from __future__ import annotations

import asyncio
import gc
import logging
import multiprocessing
import os
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.rows import namedtuple_row

from perdure import embedded, telemetry
from perdure.store import migrations
from simulation.books import TABLES
from simulation.points import reached
from simulation.rules import RULES, Rule
from simulation.seed import Seed
from simulation.world import Broken

_KEPT: list[Seed] = []
"""What dead processes have left must not be collected: it would be unwound. So a few seeds share an interpreter."""
_BATCH = 25
_TEMPLATE = "simulation"


@dataclass
class Outcome:
    """What became of a seed."""

    number: int
    broken: str = ""
    workflows: int = 0
    runs: int = 0
    statements: int = 0
    in_doubt: int = 0
    said: str = ""
    digest: str = ""
    faults: Counter[str] = field(default_factory=Counter)
    reached: frozenset[str] = frozenset()


async def prepare(url: str) -> None:
    """A database whose clock each session sets for itself."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(_TEMPLATE)))
    async with await psycopg.AsyncConnection.connect(
        make_conninfo(url, dbname=_TEMPLATE),
        autocommit=True,
        cursor_factory=psycopg.AsyncRawCursor,
        row_factory=namedtuple_row,
    ) as connection:
        await migrations.ensure(connection, "perdure", apply=True)
        await connection.execute(b"CREATE TABLE perdure.ledger (workflow_id uuid NOT NULL, token text NOT NULL)")
        await connection.execute(b"CREATE SCHEMA standby")
        for table in TABLES:
            await connection.execute(f"CREATE TABLE standby.{table} (LIKE perdure.{table})".encode())
        await connection.execute(
            "CREATE OR REPLACE FUNCTION perdure.now() RETURNS timestamptz LANGUAGE sql STABLE PARALLEL SAFE AS "
            "$$SELECT pg_catalog.to_timestamp(pg_catalog.current_setting('simulation.now')::float8)$$"
        )


def own_database(url: str) -> str:
    """A database of one's own."""
    name = f"{_TEMPLATE}_{os.getpid()}_{time.monotonic_ns()}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(_TEMPLATE))
        )
    return make_conninfo(url, dbname=name)


def play(number: int, url: str, *, trace: bool = False, without: Rule | None = None) -> Outcome:
    """Play one seed."""
    seed = Seed(number, url, without=without)
    _KEPT.append(seed)
    broken = ""
    try:
        seed.play()
    except Broken as failure:
        broken = str(failure)
    except Exception:
        broken = traceback.format_exc()
    if trace:
        for at, who, name, params, rows in seed.seen.statements:
            print(f"{at:9.4f} {who:10} {name:18} {str(params)[:150]} -> {str(rows)[:300]}")
    seen = seed.seen
    said = (
        f"{seen.workflows} workflows, {seen.runs} runs, {len(seen.statements)} statements, "
        f"{seed.loop.time():.1f} s in {seen.seconds:.2f} s, {seen.digest()} {dict(seen.faults)}"
    )
    seed.books.oracle.close()
    points = frozenset(map(str, reached(seen.statements, seen.events, seed.server.notes)))
    return Outcome(
        number=number,
        broken=broken,
        workflows=seen.workflows,
        runs=seen.runs,
        statements=len(seen.statements),
        in_doubt=sum(isinstance(event, telemetry.FlushInDoubt) for _, _, event in seen.events),
        said=said,
        digest=seen.digest(),
        faults=seen.faults,
        reached=points,
    )


def _batch(arguments: tuple[list[int], str]) -> list[Outcome]:
    numbers, url = arguments
    _alone()
    own = own_database(url)
    return [play(number, own) for number in numbers]


def _search(arguments: tuple[int, list[int], str]) -> tuple[str, Outcome | None]:
    """The first of these seeds that fails without that rule."""
    index, numbers, url = arguments
    _alone()
    own = own_database(url)
    rule = RULES[index]
    for number in numbers:
        outcome = play(number, own, without=rule)
        if outcome.broken:
            return rule.name, outcome
    return rule.name, None


def _alone() -> None:
    """This process plays, and says nothing."""
    logging.disable()
    gc.disable()  # what dead processes have left must not be unwound
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def found(numbers: list[int], jobs: int, rules: Sequence[int]) -> Iterator[tuple[str, Outcome | None]]:
    """For each rule, the first of these seeds that fails without it."""
    with embedded.temporary({"max_connections": "400"}) as cluster:
        asyncio.run(prepare(cluster.url))
        work = [(index, numbers, cluster.url) for index in rules]
        context = multiprocessing.get_context("spawn")
        with context.Pool(jobs, maxtasksperchild=1) as pool:
            yield from pool.imap_unordered(_search, work, chunksize=1)


def outcomes(numbers: list[int], jobs: int) -> Iterator[Outcome]:
    """Play them, in several processes."""
    with embedded.temporary({"max_connections": "400"}) as cluster:
        asyncio.run(prepare(cluster.url))
        batches = [(numbers[first : first + _BATCH], cluster.url) for first in range(0, len(numbers), _BATCH)]
        context = multiprocessing.get_context("spawn")
        with context.Pool(jobs, maxtasksperchild=1) as pool:
            for batch in pool.imap_unordered(_batch, batches, chunksize=1):
                yield from batch
