"""`perdure worker`, as processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Process, Run, Spawn

from perdure import App, Invocation
from perdure.cli.endings import Failure
from perdure.cli.loading import load
from perdure.embedded import Cluster

SHOP = """
import asyncio, os, sys, time
from perdure import App, step

app = App("shop", schema={schema!r})

def say(what):
    print(what, file=sys.stderr, flush=True)

@step
async def charge(order_id: int) -> str:
    return f"payment-{{order_id}}"

@step
async def wait_for_ever() -> None:
    say("waits")
    await asyncio.Event().wait()

@step
async def block_the_loop() -> None:
    say("blocks")
    time.sleep(60)

@step
def sleep_in_a_thread() -> None:
    say("sleeps")
    time.sleep(60)

@app.workflow
async def checkout(order_id: int) -> str:
    return await charge(order_id)

@app.workflow
async def waits() -> None:
    await wait_for_ever()

@app.workflow
async def blocks() -> None:
    await block_the_loop()

@app.workflow
async def sleeps() -> None:
    await sleep_in_a_thread()
"""

STARTED = r"worker \S+ runs app 'shop'"


@pytest.fixture(autouse=True)
def shop(tmp_path: Path, schema: str) -> Path:
    """An app in the current folder of the process."""
    file = tmp_path / "shop.py"
    file.write_text(SHOP.format(schema=schema))
    return file


@pytest.fixture
def importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The current folder is the test's, and what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def get(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def health(process: Process) -> str:
    return process.line(r"health: (http://\S+)/live")[1]


# --- its life ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_worker_runs_what_is_started_and_a_signal_ends_it_in_order(
    spawn: Spawn, app: App, sql: Callable[..., list[Any]], number: signal.Signals
) -> None:
    worker = spawn("worker", "shop:app")
    worker.line(STARTED)
    assert await app.run(Invocation("checkout", 42)) == "payment-42"

    worker.send(number)

    assert worker.code() == 0
    assert f"{number.name}: steps may go on for 20 s; another signal ends at once" in worker.output()
    assert sql("SELECT status FROM workers") == [("stopped",)]


def test_it_says_what_runs_where_and_keeps_the_password_to_itself(spawn: Spawn, database_url: str, schema: str) -> None:
    url = f"{database_url}&password=hunter2"
    worker = spawn("worker", "shop", "--queue", "eu", "--queue", "us", "--database-url", url)
    line = worker.line("app 'shop'")[0]
    worker.line(STARTED)
    worker.send(signal.SIGTERM)
    assert worker.code() == 0
    output = worker.output()
    line = next(line for line in worker.lines if "app 'shop': " in line)
    assert "workflows blocks, checkout, sleeps, waits; queues: eu, us; database: PostgreSQL 18." in line
    assert "perdure@" in line
    assert f"/perdure, schema {schema}" in line
    assert "hunter2" not in output


@pytest.mark.parametrize("name", ["waits", "blocks"])
async def test_a_second_signal_ends_it_at_once_even_if_a_step_blocks_the_loop(
    spawn: Spawn, app: App, name: str
) -> None:
    worker = spawn("worker", "shop:app", "--grace", "1h")
    worker.line(STARTED)
    await app.start(Invocation(name))
    worker.line(name)

    worker.send(signal.SIGTERM)
    if name == "waits":
        worker.line("SIGTERM: steps may go on for 3600 s")
    worker.send(signal.SIGINT)

    assert worker.code() in (128 + signal.SIGINT, 128 + signal.SIGTERM)  # they may overtake each other


@pytest.mark.parametrize("name", ["waits", "sleeps"])
async def test_what_outlives_the_grace_period_is_handed_over_and_not_waited_for(
    spawn: Spawn, app: App, sql: Callable[..., list[Any]], name: str
) -> None:
    worker = spawn("worker", "shop:app", "--grace", "0")
    worker.line(STARTED)
    handle = await app.start(Invocation(name))
    worker.line(name)

    worker.send(signal.SIGTERM)

    assert worker.code() == 0
    assert await handle.status() == "pending"
    assert sql("SELECT status FROM workers") == [("stopped",)]


def test_a_forked_child_dies_of_a_signal_and_the_worker_hears_nothing_of_it() -> None:
    code = """
import os, signal, threading
from perdure.cli.signals import Stopping
stopping = Stopping()
stopping.install()
asked = threading.Event()
stopping.wakes(asked.set)
for _ in range(20):
    child = os.fork()
    if child == 0:
        signal.pause()
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
assert stopping.reason is None
os.kill(os.getpid(), signal.SIGTERM)
assert asked.wait(10)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- health -----------------------------------------------------------------------------------------------------------


def test_ready_says_whether_it_claims_and_live_that_it_is_there(spawn: Spawn) -> None:
    worker = spawn("worker", "shop:app", "--health", "127.0.0.1:0")
    url = health(worker)
    worker.line(STARTED)
    until(lambda: get(f"{url}/ready") == 200)
    assert (get(f"{url}/live"), get(f"{url}/other")) == (200, 404)
    worker.send(signal.SIGTERM)
    assert worker.code() == 0


def test_a_worker_waits_for_a_database_that_is_away_and_can_be_ended_meanwhile(spawn: Spawn) -> None:
    worker = spawn(
        "worker", "shop:app", "--health", "127.0.0.1:0", "--database-url", "postgresql://perdure@127.0.0.1:1/perdure"
    )
    url = health(worker)
    worker.line("worker: the database can't be reached .*trying again")
    assert (get(f"{url}/live"), get(f"{url}/ready")) == (200, 503)
    worker.send(signal.SIGTERM)
    assert worker.code() == 0


def test_an_address_that_is_taken_is_one_line(spawn: Spawn) -> None:
    first = spawn("worker", "shop:app", "--health", "127.0.0.1:0")
    address = health(first).removeprefix("http://")
    second = spawn("worker", "shop:app", "--health", address)
    assert second.code() == 2
    assert f"perdure: can't listen on {address}: " in second.output()


# --- several processes ------------------------------------------------------------------------------------------------


def test_processes_that_die_are_started_again_and_all_end_in_order(spawn: Spawn, sql: Callable[..., list[Any]]) -> None:
    supervisor = spawn("worker", "shop:app", "--processes", "2", "--health", "127.0.0.1:0", "--lease", "2s")
    url = health(supervisor)
    first = int(supervisor.line(r"process (\d+) started")[1])
    supervisor.line(rf"\[{first}\] .*{STARTED}")
    second = int(supervisor.line(r"process (\d+) started")[1])
    supervisor.line(rf"\[{second}\] .*{STARTED}")
    until(lambda: get(f"{url}/ready") == 200)

    os.kill(first, signal.SIGKILL)
    supervisor.line(rf"process {first} was killed by SIGKILL; another one starts in 0\.\d s")
    assert (get(f"{url}/live"), get(f"{url}/ready")) == (200, 503)
    third = int(supervisor.line(r"process (\d+) started")[1])
    supervisor.line(rf"\[{third}\] .*{STARTED}")
    assert sorted(sql("SELECT pid FROM workers WHERE status = 'live' AND pid <> %s", first)) == sorted(
        [(second,), (third,)]
    )

    supervisor.send(signal.SIGTERM)
    assert supervisor.code() == 0
    assert "SIGTERM: all processes end in order" in supervisor.output()
    assert sql("SELECT count(*) FROM workers WHERE status = 'stopped'") == [(2,)]


async def test_a_second_signal_kills_all_processes(spawn: Spawn, app: App) -> None:
    supervisor = spawn("worker", "shop:app", "--processes", "2", "--grace", "1h")
    supervisor.line(STARTED)
    await app.start(Invocation("waits"))
    supervisor.line("waits")
    supervisor.send(signal.SIGINT)
    supervisor.line("SIGINT: all processes end in order")
    supervisor.send(signal.SIGINT)
    assert supervisor.code() == 130
    supervisor.output()  # nobody holds the pipe any more


def test_processes_whose_supervisor_was_killed_end_in_order(spawn: Spawn, sql: Callable[..., list[Any]]) -> None:
    supervisor = spawn("worker", "shop:app", "--processes", "2")
    supervisor.line(STARTED)
    supervisor.line(STARTED)
    supervisor.send(signal.SIGKILL)
    assert supervisor.code() == 137
    assert supervisor.output().count("the supervisor is gone: steps may go on for 20 s") == 2
    assert sql("SELECT status FROM workers") == [("stopped",), ("stopped",)]


def test_what_is_wrong_with_the_app_is_said_once_by_several_processes(spawn: Spawn) -> None:
    supervisor = spawn("worker", "shop:missing", "--processes", "3")
    assert supervisor.code() == 2
    assert supervisor.output().count("perdure: module 'shop' has no 'missing'; the apps that it has: shop:app") == 1


def test_options_reach_the_processes(spawn: Spawn, database_url: str, schema: str, sql: Callable[..., Any]) -> None:
    supervisor = spawn(
        "--database-url", database_url, "worker", "shop", "--processes", "2", "--queue", "eu", "--lease", "1500ms",
        "--concurrency", "7", "--log-format", "json", "--schema", f"{schema}_2",
        env={"PERDURE_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"},
    )  # fmt: skip
    supervisor.line("runs app 'shop'")
    rows = sql(f'SELECT queues, concurrency, expires_at - heartbeat_at FROM "{schema}_2".workers')
    assert [(queues, concurrency, lease.total_seconds()) for queues, concurrency, lease in rows] == [(["eu"], 7, 1.5)]
    supervisor.send(signal.SIGTERM)
    assert supervisor.code() == 0


# --- the log ----------------------------------------------------------------------------------------------------------


async def test_the_log_as_json_is_one_object_a_line_with_the_fields_of_events(spawn: Spawn, app: App) -> None:
    worker = spawn("worker", "shop:app", "--log-format", "json", "--log-level", "debug")
    worker.line("WorkerStarted")
    handle = await app.start(Invocation("checkout", 424242))
    assert await handle.result() == "payment-424242"
    worker.send(signal.SIGTERM)
    assert worker.code() == 0
    output = worker.output()
    lines = [json.loads(line) for line in worker.lines]
    (ended,) = (line for line in lines if line.get("event") == "WorkflowEnded")
    assert (ended["workflow_id"], ended["status"], ended["level"]) == (str(handle.id), "success", "debug")
    assert {"time", "level", "logger", "message", "pid"} <= set.intersection(*map(set, lines))
    assert "424242" not in output, "a payload is in the log"


def test_an_app_that_sets_up_logging_keeps_it(spawn: Spawn, shop: Path) -> None:
    shop.write_text(f"import logging\nlogging.basicConfig(format='MINE %(message)s')\n{shop.read_text()}")
    worker = spawn("worker", "shop:app")
    worker.line(rf"^MINE {STARTED}")
    worker.send(signal.SIGTERM)
    assert worker.code() == 0


# --- finding the app --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "code", "message"),
    [
        ("shopp:app", "", "there is no module 'shopp', neither in {folder} nor installed; start the worker where"),
        ("shop.orders:app", "", "there is no module 'shop.orders', neither in"),
        ("shop.py:app", "", "'shop.py' is a file; give the module, such as shop:app"),
        ("./a/shop.py", "", "'./a/shop.py' is a file; give the module, such as a.shop"),
        ("shop:", "", "'shop:' names no app; use MODULE:APP, such as shop:app"),
        ("shop:ap", "", "module 'shop' has no 'ap'; the apps that it has: shop:app"),
        ("shop:charge", "", "shop:charge is no App but an object of type 'Step'"),
        ("other", "", "module 'other' has no App; make one, such as app = App('shop'), or name another module"),
        (
            "other",
            "from perdure import App\na = App('a')\nb = App('b')\n",
            "module 'other' has more than one App; say which: other:a, other:b",
        ),
        (
            "other:a",
            "from perdure import App\na = App('a')\n",
            "app 'a' of 'other:a' has no workflows; declare them with @app.workflow, or name their modules in App(",
        ),
        ("other", "import shopp\n", "module 'other' can't be imported: ModuleNotFoundError: No module named 'shopp'"),
        ("other", "def x(:\n", "module 'other' can't be imported: SyntaxError: "),
        (
            "other",
            "from perdure import App\na = App('a', include=['shopp'])\n",
            "what app 'a' includes can't be imported: ModuleNotFoundError: No module named 'shopp'",
        ),
    ],
)
def test_an_app_that_cant_be_found_is_one_line(
    tmp_path: Path, importing: None, reference: str, code: str, message: str
) -> None:
    (tmp_path / "other.py").write_text(code)
    with pytest.raises(Failure) as raised:
        load(reference)
    assert raised.value.exit_code == 2
    assert str(raised.value).startswith(message.format(folder=tmp_path))


def test_an_app_is_found_by_its_module_alone(importing: None) -> None:
    assert load("shop") is load("shop:app")


def test_an_app_that_cant_be_found_ends_the_worker(spawn: Spawn) -> None:
    worker = spawn("worker", "shopp:app")
    assert worker.code() == 2
    assert worker.output().startswith("perdure: there is no module 'shopp'")


def test_an_import_that_fails_shows_where(tmp_path: Path, spawn: Spawn) -> None:
    (tmp_path / "other.py").write_text("def read():\n    return {}['key']\n\nread()\n")
    worker = spawn("worker", "other:app")
    assert worker.code() == 2
    lines = worker.output().splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1].endswith('other.py", line 4, in <module>')
    assert lines[-1] == "perdure: module 'other' can't be imported: KeyError: 'key'"
    assert not any("perdure/cli" in line or "importlib" in line for line in lines)


def test_a_signal_while_the_app_is_imported_ends_it_with_exit_code_0(tmp_path: Path, spawn: Spawn) -> None:
    (tmp_path / "slow.py").write_text("import time\nprint('imports', flush=True)\ntime.sleep(60)\n")
    worker = spawn("worker", "slow:app")
    worker.line("imports")
    worker.send(signal.SIGTERM)
    assert worker.code() == 0


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--lease", "500ms", "is too short for heartbeats; use one second or more"),
        ("--lease", "soon", "'soon' is no duration; use one such as 20, 20s, 500ms, 5m or 1h30m"),
        ("--health", "8080", "'8080' is no address; use HOST:PORT, such as 127.0.0.1:8080 or :8080"),
        ("--concurrency", "0", "0 is not in the range x>=1"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(run: Run, option: str, value: str, message: str) -> None:
    refused = run("worker", "shop:app", option, value)
    assert refused.exit_code == 2
    assert message in refused.stderr


def test_a_database_that_refuses_is_one_line(spawn: Spawn, cluster: Cluster) -> None:
    worker = spawn("worker", "shop:app", "--database-url", cluster.url.replace("/perdure?", "/nowhere?"))
    assert worker.code() == 2
    assert worker.output().splitlines()[-1].startswith("perdure: ")
    assert 'database "nowhere" does not exist; create it, or correct the database URL' in worker.output()


def until(happened: Callable[[], bool]) -> None:
    """Ask until it has happened; each question is a round trip, and the test's timeout is the limit."""
    while not happened():
        pass
