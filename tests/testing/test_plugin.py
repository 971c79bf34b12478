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


def run(folder: Path, text: str, database_url: str, *options: str, embedded: str = "") -> str:
    (folder / "shop.py").write_text(SHOP)
    (folder / "test_shop.py").write_text(text)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PERDURE_", "PYTEST_"))}
    env |= {"PERDURE_EMBEDDED_DIR": embedded} if embedded else {"PERDURE_TEST_DATABASE_URL": database_url}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=100)
    return f"{done.returncode}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (ASYNC.format(mark=""), ("-o", "asyncio_mode=auto")),
        (ASYNC.format(mark="@pytest.mark.asyncio"), ()),
        (ANYIO, ("-p", "no:asyncio")),
        (BLOCKING, ("-p", "no:asyncio", "-p", "no:anyio")),
    ],
    ids=["asyncio-auto", "asyncio-strict", "anyio", "blocking"],
)
def test_a_test_of_each_kind_finds_the_fixture(
    tmp_path: Path, database_url: str, text: str, options: tuple[str, ...]
) -> None:
    said = run(tmp_path, text, database_url, *options)
    assert said.startswith("0\n"), said
    assert "1 passed" in said


def test_without_a_server_for_tests_it_takes_the_embedded_one(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("")
    with tempfile.TemporaryDirectory(prefix="perdure-test-") as folder:
        os.chmod(folder, 0o711)  # root's server runs as somebody else
        said = run(tmp_path, BLOCKING, "", embedded=folder)
        assert said.startswith("0\n"), said
        Cluster(next(Path(folder).iterdir())).destroy()


def test_the_database_of_the_application_is_not_asked(tmp_path: Path, database_url: str, monkeypatch) -> None:
    monkeypatch.setenv("PERDURE_DATABASE_URL", "postgresql://production/")
    said = run(tmp_path, BLOCKING, database_url)
    assert said.startswith("0\n"), said
