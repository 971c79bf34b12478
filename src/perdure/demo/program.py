"""What the demo runs: a workflow that ingests one source file, and writes one row of results."""

from __future__ import annotations

import ast
import io
import os
import threading
import time
import tokenize
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import psycopg

from perdure import App, StepFailed, current, step
from perdure.config import DATABASE_URL
from perdure.demo.stage import LIBRARY, SCHEMA

PAUSE_SECONDS = 0.02
"""So that there is always something in flight when a worker is killed."""

Connection = psycopg.AsyncConnection[tuple[Any, ...]]

app = App("demo", schema=SCHEMA)
_idle: list[Connection] = []

# One thread computes at a time: more would only take the interpreter from the event loop, and `ast.parse` fails now and
# then where it runs in several threads (CPython 3.11, issue 106905).
_computing = threading.Lock()


@asynccontextmanager
async def connection() -> AsyncGenerator[Connection]:
    """A connection to the database of the app; it is kept for the next one who asks."""
    taken = _idle.pop() if _idle else await psycopg.AsyncConnection.connect(os.environ[DATABASE_URL], autocommit=True)
    try:
        yield taken
    except BaseException:
        await taken.close()
        raise
    _idle.append(taken)


async def close() -> None:
    """Close what is kept."""
    while _idle:
        await _idle.pop().close()


@step
def read(path: str) -> str:
    """The text of a source file, in the encoding that it declares."""
    time.sleep(PAUSE_SECONDS)
    with tokenize.open(LIBRARY / path) as file:
        return file.read()


@step
def count_definitions(text: str) -> int:
    """How many functions and classes it defines."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    with _computing:
        return sum(isinstance(node, kinds) for node in ast.walk(ast.parse(text)))


@step
def count_tokens(text: str) -> int:
    """How many tokens it has."""
    with _computing:
        return sum(1 for _ in tokenize.generate_tokens(io.StringIO(text).readline))


@app.transaction(using=connection)
async def store(
    connection: Connection, ordinal: int, path: str, definitions: int | None, tokens: int | None, problem: str | None
) -> None:
    """Write the row. No constraint keeps a second one out: that it stays one is what the demo is about.

    `attempt` counts the workers that have had the workflow: 1, or more where it was taken over.
    """
    await connection.execute(
        f"""
        INSERT INTO {SCHEMA}.results (ordinal, path, workflow_id, attempt, process, definitions, tokens, problem)
        SELECT %s, %s, id, epoch, %s, %s, %s, %s FROM {SCHEMA}.workflows WHERE status = 'running' AND id = %s
        """,
        (ordinal, path, os.getpid(), definitions, tokens, problem, current().id),
    )


@app.workflow
async def ingest(ordinal: int, path: str) -> bool:
    """Read, parse, tokenise, write. What doesn't parse gets its row as well, with the reason."""
    definitions = tokens = problem = None
    try:
        text = await read(path)
        definitions = await count_definitions(text)
        tokens = await count_tokens(text)
    except (SyntaxError, ValueError, StepFailed) as error:
        problem = f"{type(error).__name__}: {error}"
    await store(ordinal, path, definitions, tokens, problem)
    return problem is None
