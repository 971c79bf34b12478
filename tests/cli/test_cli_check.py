"""`perdure check`: whether the code at hand can go on with what is in a database."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from click.testing import Result
from processes import Run
from psycopg.conninfo import make_conninfo

from perdure import App, gate, step
from perdure.blocking import BlockingHandle
from perdure.testing import perdure_app

CODE = """
import asyncio
from datetime import timedelta
from perdure import App, Retry, RetryAfter, patched, sleep, step

app = App("parcels")
RAN = []

@step
async def weigh(kilos: int) -> int:
    RAN.append("weigh")
    return kilos

@step(pure=True)
def label(kilos: int) -> str:
    RAN.append("label")
    return f"{kilos} kg"

@step(on_exhausted="park")
async def hand_out() -> None:
    RAN.append("hand_out")
    raise ValueError("nobody at home")

@step(retry=Retry(max_attempts=5, initial=timedelta(hours=1), maximum=timedelta(hours=1)))
async def knock() -> None:
    RAN.append("knock")
    raise ValueError("nobody at home")

@step
async def poll() -> None:
    RAN.append("poll")
    raise RetryAfter(timedelta(hours=1), counts=False)

@app.workflow
async def ship(kilos: int) -> str:
    weighed, text = await asyncio.gather(weigh(kilos), label(kilos))
    await sleep(timedelta(days=weighed))
    return text

@app.workflow
async def fail(kilos: int) -> None:
    await weigh(kilos)
    raise ValueError("lost")

@app.workflow
async def wait(kilos: int, how: str) -> None:
    await weigh(kilos)
    await {"parked": hand_out, "retrying": knock, "polling": poll}[how]()
"""


class Shop:
    """An app in a folder of its own, with workflows in every state, and its code to be edited."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
        self._folder = folder
        self._monkeypatch = monkeypatch
        self._run = run
        self.url = ""
        self.schema = ""

    def write(self, *edits: tuple[str, str]) -> str:
        """The code with these edits, as a module; returns its name."""
        text = CODE
        for old, new in edits:
            assert old in text
            text = text.replace(old, new)
        name = f"parcels_{uuid4().hex[:10]}"
        (self._folder / f"{name}.py").write_text(text)
        return name

    def check(self, *options: str, edits: tuple[tuple[str, str], ...] = (), url: str = "") -> Result:
        self._monkeypatch.chdir(self._folder)
        name = self.write(*edits)
        result = self._run("check", f"{name}:app", "--against", url or self.url, "--schema", self.schema, *options)
        if name in sys.modules:
            assert sys.modules[name].RAN == [], "no body runs"
        return result


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, database_url: str) -> Iterator[Shop]:
    shop = Shop(tmp_path, monkeypatch, run)
    monkeypatch.syspath_prepend(str(tmp_path))
    code = importlib.import_module(shop.write())
    with perdure_app(code.app, database_url=database_url) as kit:
        shop.url, shop.schema = database_url, kit.schema
        start = code.app.blocking.start
        start(code.ship(0), key="done")
        start(code.ship(2), key="asleep")
        start(code.fail(1), key="failed")
        for how in ("parked", "retrying", "polling"):
            start(code.wait(1, how), key=how)
        cancelled: BlockingHandle[Any] = start(code.ship(3), key="cancelled")
        terminated: BlockingHandle[Any] = start(code.ship(3), key="terminated")
        kit.idle()
        cancelled.cancel(reason="sold out")
        terminated.terminate()
        kit.idle()
        start(code.ship(4), key="late", timeout=timedelta(seconds=1))
        kit.clock.advance(timedelta(minutes=1))
        kit.stop_worker()
        start(code.ship(5), key="pending")
        yield shop


def rows(url: str, schema: str) -> list[Any]:
    with psycopg.connect(url, options=f"-c search_path={schema}") as connection:
        return [
            row
            for table in ("workflow_rows", "checkpoints", "queue_entries", "waits", "deadlines")
            for row in connection.execute(f"SELECT t::text FROM {table} AS t ORDER BY 1".encode()).fetchall()
        ]


def test_the_same_code_matches_all_of_them_and_writes_nothing(shop: Shop) -> None:
    before = rows(shop.url, shop.schema)
    checked = shop.check()
    assert (checked.exit_code, checked.stderr) == (0, "")
    assert re.fullmatch(
        r"10 workflows replayed with version [0-9a-f]{12}: 10 match, 0 differ, 0 mismatch\n", checked.stdout
    )
    assert rows(shop.url, shop.schema) == before


def test_a_mismatch_is_shown_as_a_diff_and_fails(shop: Shop) -> None:
    checked = shop.check(
        "--name", "wait", edits=(("    await weigh(kilos)\n    await {", "    await weigh(9)\n    await {"),)
    )
    assert checked.exit_code == 1
    lines = checked.stdout.splitlines()
    assert re.fullmatch(
        r"wait [0-9a-f-]{36} and 2 more: mismatch: the code asks for something else than what was recorded", lines[0]
    )
    assert lines[1] == "    at weigh (outcome 1)"
    assert re.fullmatch(r"  - step 'weigh'  \[version [0-9a-f]{12}\]", lines[2])
    assert re.fullmatch(r"  \+ step 'weigh' with other arguments  \[version [0-9a-f]{12}\]", lines[3])
    assert lines[4].endswith("0 match, 0 differ, 3 mismatch")
    assert "\x1b" not in checked.stdout


@pytest.mark.parametrize(
    ("edit", "note"),
    [
        (("kilos: int) -> str:\n    weighed", "kilos: str) -> str:\n    weighed"), "a worker would end it in error"),
        (("    await sleep(timedelta(days=weighed))", "    raise TypeError('oh')"), "a worker would end it in error"),
        (
            ("    await sleep(timedelta(days=weighed))", "    await asyncio.sleep(weighed)"),
            "a worker would end it in error",
        ),
    ],
    ids=["input", "raises", "foreign"],
)
def test_code_that_would_end_them_in_error_is_a_mismatch(shop: Shop, edit: tuple[str, str], note: str) -> None:
    checked = shop.check("--status", "waiting", "--name", "ship", edits=(edit,))
    assert checked.exit_code == 1, checked.stdout
    assert note in checked.stdout


def test_another_path_differs_and_fails_with_strict_only(shop: Shop) -> None:
    edits = (
        ("    await sleep(timedelta(days=weighed))", "    await weigh(7)\n    await sleep(timedelta(days=weighed))"),
    )
    checked = shop.check("--name", "ship", edits=edits)
    assert checked.exit_code == 0
    assert "the code asks for something new first" in checked.stdout or "it doesn't end" in checked.stdout
    assert shop.check("--name", "ship", "--strict", edits=edits).exit_code == 1


def test_a_new_step_behind_patched_matches_what_hasnt_ended(shop: Shop) -> None:
    edits = (
        (
            "    await sleep(timedelta(days=weighed))",
            "    if patched('again'):\n        await weigh(7)\n    await sleep(timedelta(days=weighed))",
        ),
    )
    checked = shop.check("--status", "waiting", "--strict", edits=edits)
    assert (checked.exit_code, checked.stdout.count("4 match")) == (0, 1), checked.stdout


def test_another_result_differs(shop: Shop) -> None:
    checked = shop.check("--status", "success", edits=(("    return text", "    return text + '!'"),))
    assert checked.exit_code == 0
    assert 'the result "0 kg"' in checked.stdout
    assert 'the result "0 kg!"' in checked.stdout


def test_names_that_the_app_does_not_know_are_counted(shop: Shop) -> None:
    edits = (("@app.workflow\nasync def wait", "async def wait"),)
    checked = shop.check(edits=edits)
    assert checked.exit_code == 0
    assert checked.stdout.endswith("unfinished workflows of names that this app doesn't know: wait (3)\n")
    assert shop.check("--strict", edits=edits).exit_code == 1


def test_how_many_that_have_ended_can_be_said(shop: Shop) -> None:
    assert shop.check("--finished", "0").stdout.startswith("5 workflows replayed")
    assert shop.check("--finished", "1", "--status", "cancelled").stdout.startswith("1 workflow replayed")


def test_a_program_gets_one_object(shop: Shop) -> None:
    checked = shop.check("--json", edits=(("    return text", "    return text + '!'"),))
    report = json.loads(checked.stdout)
    assert {name: report[name] for name in ("replayed", "matches", "differs", "mismatch", "unknown")} == {
        "replayed": 10,
        "matches": 9,
        "differs": 1,
        "mismatch": 0,
        "unknown": {},
    }
    (parted,) = report["workflows"]
    assert (parted["name"], parted["verdict"], parted["key"]) == ("ship", "differs", "$result")


def test_the_right_to_read_on_a_standby_is_enough(shop: Shop, database_url: str) -> None:
    role = f"reader_{uuid4().hex[:8]}"
    with psycopg.connect(database_url, autocommit=True) as connection:
        for text in (
            f"CREATE ROLE {role} LOGIN",
            f"ALTER ROLE {role} SET default_transaction_read_only = on",  # as all transactions on a standby
            f"GRANT USAGE ON SCHEMA {shop.schema} TO {role}",
            f"GRANT SELECT ON ALL TABLES IN SCHEMA {shop.schema} TO {role}",
        ):
            connection.execute(text.encode())
        try:
            checked = shop.check(url=make_conninfo(database_url, user=role))
            assert (checked.exit_code, checked.stderr) == (0, "")
            assert "10 match" in checked.stdout
        finally:
            connection.execute(f"DROP OWNED BY {role}".encode())
            connection.execute(f"DROP ROLE {role}".encode())


def test_a_schema_that_is_not_there_is_not_made(shop: Shop, sql: Callable[..., list[Any]]) -> None:
    shop.schema = "nowhere"
    checked = shop.check()
    assert checked.exit_code == 2
    assert "run 'perdure migrate'" in checked.stderr
    assert sql("SELECT count(*) FROM pg_namespace WHERE nspname = 'nowhere'") == [(0,)]


def test_hostile_rows_are_no_surprise(shop: Shop, database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True, options=f"-c search_path={shop.schema}") as connection:
        connection.execute("UPDATE checkpoints SET payload = '[1]' WHERE kind = 'input'")
        connection.execute("UPDATE checkpoints SET key = E'we\\x1bigh' WHERE key = 'weigh'")
    checked = shop.check()
    assert checked.exit_code == 1
    assert "\x1b" not in checked.stdout


async def test_two_checks_of_a_busy_database_find_no_mismatch(app: App) -> None:
    """What is being written while it is read is read in one snapshot."""

    @step
    async def count(number: int) -> int:
        return number

    @app.workflow
    async def busy() -> int:
        return sum([await count(number) for number in range(30)])

    async with app.worker(concurrency=20):
        handles = await app.start_many([busy() for _ in range(60)])
        seen: list[Any] = []
        for _ in range(5):
            seen += [replayed async for replayed in gate.replay(app, app.workflows())]
        for handle in handles:
            assert await handle.result() == 435
    assert {replayed.verdict for replayed in seen} == {"matches"}
