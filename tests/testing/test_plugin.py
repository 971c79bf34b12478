"""The pytest plugin, in a project of a user's own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from perdure.embedded import Cluster

SHOP = """
from datetime import timedelta
from perdure import App, sleep, step

app = App("shop")

@step
async def charge(order_id: int) -> str:
    return f"payment-{order_id}"

@app.workflow
async def checkout(order_id: int) -> str:
    payment = await charge(order_id)
    await sleep(timedelta(days=1))
    return payment

@step(on_exhausted="park")
async def give_up() -> None:
    raise ValueError("an operator must see to it")

@app.workflow
async def stuck() -> None:
    await give_up()
"""
ASYNC = """
import pytest
from datetime import timedelta
from shop import app, checkout

{mark}
async def test_checkout(perdure_app):
    async with perdure_app(app) as kit:
        handle = await app.start(checkout(1))
        await kit.clock.advance(timedelta(days=1))
        assert await handle.result() == "payment-1"
"""
BLOCKING = """
from shop import app, checkout

def test_checkout(perdure_app):
    with perdure_app(app) as kit:
        assert kit.run(checkout(1)) == "payment-1"
"""
STUCK = """
def test_stuck(perdure_app):
    from shop import stuck

    with perdure_app(app) as kit:
        kit.run(stuck())
"""
ANYIO = """
import pytest
from shop import app, checkout

@pytest.fixture
def anyio_backend():
    return "asyncio"

@pytest.fixture
async def kit(perdure_app, anyio_backend):
    async with perdure_app(app) as kit:
        yield kit

@pytest.mark.anyio
async def test_checkout(kit):
    assert await kit.run(checkout(1)) == "payment-1"
"""


def run(folder: Path, tests: dict[str, str], database_url: str, *options: str, embedded: str = "") -> str:
    """Run a project's tests; returns the exit code, a line of its own, and what pytest said."""
    (folder / "shop.py").write_text(SHOP)
    for name, text in tests.items():
        (folder / f"test_{name}.py").write_text(text)
    own = ("PERDURE_TEST_DATABASE_URL", "PERDURE_EMBEDDED_DIR")
    env = {name: value for name, value in os.environ.items() if name not in own and not name.startswith("PYTEST_")}
    env |= {"PERDURE_EMBEDDED_DIR": embedded} if embedded else {"PERDURE_TEST_DATABASE_URL": database_url}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=100)
    return f"{done.returncode}\n{done.stdout}{done.stderr}"


def test_a_test_of_each_kind_finds_the_fixture(
    tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERDURE_DATABASE_URL", "postgresql://production/")  # isn't asked: it may matter
    tests = {"asyncio": ASYNC.format(mark="@pytest.mark.asyncio"), "anyio": ANYIO, "blocking": BLOCKING}
    said = run(tmp_path, tests, database_url)
    assert said.startswith("0\n"), said
    assert "3 passed" in said


def test_no_mark_is_needed_where_pytest_asyncio_takes_all(tmp_path: Path, database_url: str) -> None:
    said = run(tmp_path, {"asyncio": ASYNC.format(mark="")}, database_url, "-o", "asyncio_mode=auto")
    assert said.startswith("0\n"), said
    assert "1 passed" in said


def test_anyio_needs_no_other_plugin_and_a_failure_says_what_is_wrong(tmp_path: Path, database_url: str) -> None:
    failing = BLOCKING.replace('"payment-1"', '"payment-2"') + STUCK
    said = run(tmp_path, {"anyio": ANYIO, "failing": failing}, database_url, "-p", "no:asyncio", "--tb=short")
    assert said.startswith("1\n"), said
    assert "1 passed" in said
    assert "2 failed" in said
    assert "AssertionError: assert 'payment-1' == 'payment-2'" in said
    assert "TimeoutError: workflow 'stuck' is waiting, for operator, and nothing is due: give it what it waits" in said


def test_without_a_server_for_tests_it_takes_the_embedded_one(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("")
    with tempfile.TemporaryDirectory(prefix="perdure-test-") as folder:
        os.chmod(folder, 0o711)  # root's server runs as somebody else
        options = ("-p", "no:asyncio", "-p", "no:anyio")
        said = run(tmp_path, {"blocking": BLOCKING}, "", *options, embedded=folder)
        assert said.startswith("0\n"), said
        Cluster(next(Path(folder).iterdir())).destroy()
