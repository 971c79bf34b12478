"""`perdure workflow cancel`, `terminate`, `resume`, `delete`, `prune`, `export`, `import`, and `perdure versions`.

On an app whose worker lives in a thread of the tests. Each test marks its workflows with an attribute of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import pty
import queue
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import click
import psycopg
import pytest
from click.testing import Result
from processes import PATIENCE, PERDURE, Run, Spawn

from perdure import App, Retry, Workflow, sleep, step, telemetry
from perdure.cli.workflows import workflow
from perdure.embedded import Cluster

MISSING = "01a206e8-b5f0-76e2-a285-1162a825003a"
ANOTHER = "01a206e8-b5f0-76e2-a285-1162a825003b"
COMMANDS = ["cancel", "terminate", "resume", "delete"]
REPAIRED: set[str] = set()
CLEANED: list[str] = []


@step
async def charge(order_id: int) -> str:
    return f"payment-{order_id}"


@step(retry=Retry(max_attempts=1))
async def ship(order: str) -> str:
    if order not in REPAIRED:
        raise ValueError("no truck")
    return f"shipped {order}"


@step(retry=Retry(max_attempts=2, initial=timedelta(milliseconds=1)), on_exhausted="park")
async def print_label(order: str) -> str:
    if order not in REPAIRED:
        raise ValueError("no paper")
    return f"label of {order}"


@step(retry=Retry(max_attempts=20, initial=timedelta(milliseconds=1), factor=1e8, maximum=timedelta(hours=1)))
async def knock() -> None:
    raise ValueError("nobody is there")


@step
async def clean(order: str) -> None:
    CLEANED.append(order)


@pytest.fixture(scope="module")
def schema(cluster: Cluster) -> Iterator[str]:
    """One schema for all tests here, with a worker."""
    name = f"test_{uuid4().hex[:12]}"
    app = App("shop", database_url=cluster.url, schema=name)

    @app.workflow
    async def checkout(order_id: int) -> str:
        return await charge(order_id)

    @app.workflow
    async def delivery(order: str) -> str:
        await charge(1)
        return await ship(order)

    @app.workflow
    async def labels(order: str) -> str:
        return await print_label(order)

    @app.workflow
    async def patience(order: str) -> None:
        try:
            await sleep(timedelta(hours=1))
        finally:
            await clean(order)

    @app.workflow
    async def visit() -> None:
        await sleep(timedelta(0))
        await knock()

    ready = threading.Event()
    control: list[Any] = []

    async def work() -> None:
        stopping = asyncio.Event()
        control.extend((asyncio.get_running_loop(), stopping))
        async with app, app.worker():
            ready.set()
            await stopping.wait()

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    assert ready.wait(30)
    yield name
    loop, stopping = control
    loop.call_soon_threadsafe(stopping.set)
    thread.join(30)


class Heard:
    """The events of the worker's thread since the test began."""

    def __init__(self) -> None:
        self._arrived: queue.SimpleQueue[telemetry.Event] = queue.SimpleQueue()
        self._seen: list[telemetry.Event] = []

    def __call__(self, event: telemetry.Event) -> None:
        self._arrived.put(event)

    def wait(self, kind: type[telemetry.Event], id: str, **expected: object) -> None:
        """Until there was one of that kind for that workflow; each counts once."""
        while True:
            for event in self._seen:
                if (
                    isinstance(event, kind)
                    and str(getattr(event, "workflow_id", "")) == id
                    and all(getattr(event, name) == value for name, value in expected.items())
                ):
                    self._seen.remove(event)
                    return
            self._seen.append(self._arrived.get(timeout=PATIENCE))


@pytest.fixture
def heard() -> Iterator[Heard]:
    heard = Heard()
    unsubscribe = telemetry.subscribe(heard)
    yield heard
    unsubscribe()


@pytest.fixture
def mine() -> str:
    """What only the workflows of the test have, as an option of `start` and of filters."""
    return f"--attribute=test=t{uuid4().hex}"


@pytest.fixture
def elsewhere() -> str:
    """A schema that no other test uses; it isn't there yet, and has no worker."""
    return f"test_{uuid4().hex[:12]}"


@pytest.fixture
def aside(run: Run, elsewhere: str) -> Run:
    """`run`, there."""

    def aside(*arguments: str, input: str | None = None) -> Result:
        return run(*arguments, env={"PERDURE_SCHEMA": elsewhere}, input=input)

    return aside


def start(run: Run, name: str, *arguments: str) -> str:
    started = run("workflow", "start", name, *arguments)
    assert started.exit_code == 0, started.stderr
    return str(started.stdout.strip())


def later(run: Run, *arguments: str) -> str:
    """One that waits for its start."""
    return start(run, "checkout", "[1]", "--delay", "1h", *arguments)


def ended(run: Run, name: str, *arguments: str) -> str:
    return str(run("workflow", "start", name, *arguments, "--wait").stderr.splitlines()[0])


def shown(run: Run, id: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("workflow", "show", id, "--json").stdout)
    return found


def status(run: Run, id: str) -> str:
    return str(shown(run, id)["status"])


def is_there(run: Run, id: str) -> bool:
    return run("workflow", "show", id).exit_code == 0


def outcomes(result: Result) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


# --- which workflows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_names_no_workflows_does_nothing_and_says_what_to_give(
    run: Run, mine: str, command: str
) -> None:
    id = later(run, mine)
    refused = run("workflow", command)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "say which workflows: give ids, a filter such as --name or --status, or --all" in refused.stderr
    assert status(run, id) == "waiting"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "arguments",
    [[MISSING, "--name", "checkout"], [MISSING, "--all"], ["--all", "--name", "checkout"]],
    ids=["ids and a filter", "ids and --all", "a filter and --all"],
)
def test_ids_and_filters_and_all_dont_go_together(run: Run, command: str, arguments: list[str]) -> None:
    refused = run("workflow", command, *arguments)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "give ids, a filter, or --all; they don't go together" in refused.stderr


@pytest.mark.parametrize("option", ["--name", "--queue", "--key-prefix"])
def test_an_empty_filter_isnt_taken_for_none(run: Run, option: str) -> None:
    refused = run("workflow", "cancel", option, "")
    assert refused.exit_code == 2
    assert "it is empty; leave the option out" in refused.stderr


@pytest.mark.parametrize(
    ("command", "status"), [("cancel", "success"), ("terminate", "error"), ("resume", "success"), ("delete", "running")]
)
def test_a_status_to_which_it_cant_be_done_is_refused(run: Run, command: str, status: str) -> None:
    refused = run("workflow", command, "--status", status)
    assert refused.exit_code == 2
    assert f"'{status}' is not one of" in refused.stderr


def test_what_is_no_id_is_refused(run: Run) -> None:
    refused = run("workflow", "cancel", "checkout")
    assert refused.exit_code == 2
    assert "'checkout' is not a valid UUID" in refused.stderr


def test_each_filter_finds_what_it_would_find_in_a_list(run: Run, mine: str) -> None:
    first = later(run, mine, "--key", f"{mine}-1")
    second = later(run, mine, "--queue", "eu")

    def found(*filter: str) -> list[str]:
        listed = run("workflow", "cancel", "--dry-run", "--json", mine, *filter)
        assert listed.exit_code == 0, listed.stderr
        return [row["id"] for row in outcomes(listed)]

    assert found() == [second, first]
    assert found("--queue", "eu") == [second]
    assert found("--key-prefix", f"{mine}-") == [first]
    assert found("--name", "checkout", "--status", "waiting", "--since", "1h") == [second, first]
    assert found("--name", "other") == found("--status", "running") == found("--until", "1h") == []


def test_an_attribute_that_only_looks_like_a_number_is_a_text(run: Run) -> None:
    id = later(run, "--attribute", "commit=25077325e906")
    assert shown(run, id)["attributes"] == {"commit": "25077325e906"}
    assert run("workflow", "cancel", "--attribute", "commit=25077325e906").stdout == f"{id}\n"


def test_a_duration_that_leads_before_the_calendar_is_refused(run: Run) -> None:
    refused = run("workflow", "list", "--since", "9999999d")
    assert refused.exit_code == 2
    assert "9999999 days ago there was no calendar" in refused.stderr


def test_a_filter_that_finds_nothing_is_no_failure(run: Run, mine: str) -> None:
    done = run("workflow", "cancel", mine)
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "0 workflows asked to end\n")
    assert run("workflow", "delete", mine, "--yes", "--json").stdout == "[]\n"


def test_the_schema_isnt_made_for_it(run: Run, sql: Callable[..., list[Any]]) -> None:
    other = f"test_{uuid4().hex[:12]}"
    refused = run("workflow", "--schema", other, "cancel", "--all")
    assert refused.exit_code == 2
    assert "run 'perdure migrate'" in refused.stderr
    assert sql("SELECT 1 FROM pg_namespace WHERE nspname = %s", other) == []


# --- a dry run --------------------------------------------------------------------------------------------------------


def test_a_dry_run_lists_what_would_be_done_and_does_nothing(run: Run, mine: str) -> None:
    first, second = later(run, mine), later(run, mine)
    listed = run("workflow", "terminate", mine, "--dry-run")
    assert listed.exit_code == 0
    assert [line.split() for line in listed.stdout.splitlines()] == [
        ["id", "name", "status"],
        [second, "checkout", "waiting"],
        [first, "checkout", "waiting"],
    ]
    assert listed.stderr == "2 workflows would be terminated\n"
    assert [status(run, id) for id in (first, second)] == ["waiting", "waiting"]


def test_a_dry_run_on_ids_says_to_which_it_couldnt_be_done(run: Run) -> None:
    waiting, done = later(run), ended(run, "checkout", "[1]")
    listed = run("workflow", "cancel", waiting, done, MISSING, "--dry-run")
    assert listed.exit_code == 1
    assert waiting in listed.stdout
    assert done not in listed.stdout
    assert f"perdure: workflow {done} has status 'success': it has ended" in listed.stderr
    assert f"perdure: there is no workflow '{MISSING}'" in listed.stderr
    assert status(run, waiting) == "waiting"


def test_a_dry_run_for_programs_has_name_and_status(run: Run) -> None:
    id = later(run)
    (row, missing) = outcomes(run("workflow", "cancel", id, MISSING, "--dry-run", "--json"))
    assert row == {"id": id, "name": "checkout", "status": "waiting", "done": False, "error": None}
    assert (missing["id"], missing["name"], missing["done"]) == (MISSING, None, False)
    assert missing["error"].startswith("there is no workflow")


def test_a_dry_run_of_resume_lists_only_those_with_something_to_resume(run: Run, mine: str, heard: Heard) -> None:
    later(run, mine)
    parked = start(run, "labels", "--arg=order=dry", mine)
    heard.wait(telemetry.WorkflowSuspended, parked, waiting_for="operator")
    listed = run("workflow", "resume", "--status", "waiting", mine, "--dry-run", "--json")
    assert [row["id"] for row in outcomes(listed)] == [parked]


# --- cancel -----------------------------------------------------------------------------------------------------------


def test_cancel_lets_the_code_clean_up(run: Run, heard: Heard) -> None:
    id = start(run, "patience", "--arg=order=cancelled")
    heard.wait(telemetry.WorkflowSuspended, id)
    cancelled = run("workflow", "cancel", id, "--reason", "order withdrawn")
    assert (cancelled.exit_code, cancelled.stdout, cancelled.stderr) == (0, f"{id}\n", "")
    heard.wait(telemetry.WorkflowEnded, id)
    assert "cancelled" in CLEANED
    row = shown(run, id)
    assert row["status"] == "cancelled"
    assert "order withdrawn" in row["error"]["message"]


def test_of_several_ids_those_that_can_be_done_are_done(run: Run) -> None:
    first, done, last = later(run), ended(run, "checkout", "[1]"), later(run)
    cancelled = run("workflow", "cancel", first, MISSING, done, last)
    assert (cancelled.exit_code, cancelled.stdout) == (1, f"{first}\n{last}\n")
    missing, over = cancelled.stderr.splitlines()
    assert missing.startswith(f"perdure: there is no workflow '{MISSING}'; check the id")
    assert over.startswith(f"perdure: workflow {done} has status 'success': it has ended")
    assert [status(run, id) for id in (first, done, last)] == ["cancelled", "success", "cancelled"]


def test_for_programs_there_is_one_array(run: Run) -> None:
    id = later(run)
    cancelled = run("workflow", "cancel", id, MISSING, "--json")
    assert cancelled.exit_code == 1
    done, missing = outcomes(cancelled)
    assert done == {"id": id, "done": True, "error": None}
    assert (missing["id"], missing["done"]) == (MISSING, False)
    assert missing["error"].startswith("there is no workflow")


def test_an_id_that_is_given_twice_is_one(run: Run) -> None:
    id = later(run)
    assert run("workflow", "cancel", id, id).stdout == f"{id}\n"


def test_cancel_by_filter_asks_nothing_and_leaves_others_alone(run: Run, mine: str) -> None:
    other = later(run)
    mine_too = [later(run, mine), later(run, mine)]
    done = ended(run, "checkout", "[1]", mine)
    cancelled = run("workflow", "cancel", mine)
    assert cancelled.exit_code == 0
    assert cancelled.stdout.split() == mine_too[::-1]
    assert cancelled.stderr == "2 workflows asked to end\n"
    assert [status(run, id) for id in (*mine_too, other, done)] == ["cancelled", "cancelled", "waiting", "success"]


async def test_show_says_that_a_workflow_was_asked_to_end(
    aside: Run, elsewhere: str, database_url: str, events: Any
) -> None:
    async with App("shop", database_url=database_url, schema=elsewhere) as app:

        @app.workflow
        async def patience() -> None:
            await sleep(timedelta(hours=1))

        async with app.worker():
            handle = await app.start(patience())
            await events.wait_for(telemetry.WorkflowSuspended, lambda event: event.workflow_id == handle.id)
    before = await asyncio.to_thread(aside, "workflow", "show", str(handle.id))
    await asyncio.to_thread(aside, "workflow", "cancel", str(handle.id), "--reason", "too late")

    after = await asyncio.to_thread(aside, "workflow", "show", str(handle.id))

    assert "note" not in before.stdout
    assert re.search(r"^note +it was asked to end: too late$", after.stdout, re.MULTILINE)


# --- terminate --------------------------------------------------------------------------------------------------------


def test_terminate_runs_no_more_code(run: Run, heard: Heard) -> None:
    id = start(run, "patience", "--arg=order=terminated")
    heard.wait(telemetry.WorkflowSuspended, id)
    terminated = run("workflow", "terminate", id, "--reason", "wrong deploy")
    assert (terminated.exit_code, terminated.stdout) == (0, f"{id}\n")
    row = shown(run, id)
    assert row["status"] == "cancelled"
    assert "wrong deploy" in row["error"]["message"]
    assert "terminated" not in CLEANED


@pytest.mark.parametrize("command", ["terminate", "delete"])
def test_where_nobody_can_be_asked_a_filter_needs_a_yes(run: Run, mine: str, command: str) -> None:
    id = later(run, mine)
    if command == "delete":
        run("workflow", "cancel", id)
    before = status(run, id)
    refused = run("workflow", command, mine, input="y\n")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "there is no terminal to ask on; give --yes, or --dry-run to see what would be done" in refused.stderr
    assert status(run, id) == before

    done = run("workflow", command, mine, "--yes")
    assert (done.exit_code, done.stdout) == (0, f"{id}\n")
    assert done.stderr == f"1 workflow {command}d\n"


class Terminal:
    """A command that somebody has called on a terminal."""

    def __init__(self, arguments: list[str], env: dict[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        self._process = subprocess.Popen([PERDURE, *arguments], env=env, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        self.text = ""

    def until(self, text: str) -> None:
        """Read until it has written that."""
        while text not in self.text:
            self.text += os.read(self._ours, 4096).decode()

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C, once it waits for an answer: of one that comes just before, Python hears when the read has ended."""
        stat = Path(f"/proc/{self._process.pid}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "S":
            pass
        self._process.send_signal(signal.SIGINT)

    def code(self) -> int:
        """Read to the end; returns the exit code."""
        try:
            while read := os.read(self._ours, 4096):
                self.text += read.decode()
        except OSError:  # on Linux the end of a terminal is an error
            pass
        return self._process.wait(PATIENCE)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal(environment: dict[str, str]) -> Iterator[Callable[..., Terminal]]:
    terminals: list[Terminal] = []

    def call(*arguments: str) -> Terminal:
        terminals.append(Terminal([*arguments], environment))
        return terminals[-1]

    yield call
    for each in terminals:
        each.close()


@pytest.mark.parametrize(
    ("answer", "code", "left"), [("y\n", 0, "cancelled"), ("n\n", 1, "waiting"), ("\n", 1, "waiting")]
)
def test_on_a_terminal_a_filter_asks_before_it_terminates(
    run: Run, terminal: Callable[..., Terminal], mine: str, answer: str, code: int, left: str
) -> None:
    ids = [later(run, mine), later(run, mine)]
    asked = terminal("workflow", "terminate", mine)
    asked.until("Terminate 2 workflows, without any cleaning up? [y/N]")
    asked.type(answer)
    assert asked.code() == code
    assert ("perdure: nothing is done" in asked.text) is (code == 1)
    assert [status(run, id) for id in ids] == [left, left]


def test_ctrl_c_at_the_question_does_nothing(run: Run, terminal: Callable[..., Terminal], mine: str) -> None:
    id = ended(run, "checkout", "[1]", mine)
    asked = terminal("workflow", "delete", mine)
    asked.until("Delete 1 workflow, with all that was recorded? [y/N]: ")
    asked.interrupt()
    assert asked.code() == 130
    assert is_there(run, id)


# --- resume -----------------------------------------------------------------------------------------------------------


def test_resume_goes_on_from_the_last_checkpoint(run: Run, heard: Heard) -> None:
    id = ended(run, "delivery", "--arg=order=resumed")
    heard.wait(telemetry.WorkflowEnded, id, status="error")
    assert status(run, id) == "error"
    REPAIRED.add("resumed")
    resumed = run("workflow", "resume", id)
    assert (resumed.exit_code, resumed.stdout, resumed.stderr) == (0, f"{id}\n", "")
    heard.wait(telemetry.WorkflowEnded, id, status="success")
    assert shown(run, id)["output"] == "shipped resumed"


def test_resume_by_filter_is_for_those_that_failed(run: Run, mine: str, heard: Heard) -> None:
    cancelled = later(run, mine)
    run("workflow", "cancel", cancelled)
    failed = ended(run, "delivery", "--arg=order=many", mine)
    REPAIRED.add("many")
    resumed = run("workflow", "resume", mine)
    assert (resumed.exit_code, resumed.stdout, resumed.stderr) == (0, f"{failed}\n", "1 workflow resumed\n")
    heard.wait(telemetry.WorkflowEnded, failed, status="success")
    assert status(run, cancelled) == "cancelled"


def test_resume_tries_a_parked_step_anew(run: Run, mine: str, heard: Heard) -> None:
    sleeper = later(run, mine)
    id = start(run, "labels", "--arg=order=parked", mine)
    heard.wait(telemetry.WorkflowSuspended, id, waiting_for="operator")
    REPAIRED.add("parked")
    resumed = run("workflow", "resume", "--status", "waiting", mine)
    assert (resumed.exit_code, resumed.stdout) == (0, f"{id}\n")
    assert resumed.stderr == "1 workflow resumed; 1 left: there is nothing to be done with it\n"
    heard.wait(telemetry.WorkflowEnded, id, status="success")
    assert shown(run, id)["output"] == "label of parked"
    assert status(run, sleeper) == "waiting"


def test_resume_of_one_that_succeeded_says_why_not(run: Run) -> None:
    id = ended(run, "checkout", "[1]")
    refused = run("workflow", "resume", id)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr.startswith(f"perdure: workflow {id} has status 'success': it has succeeded")


# --- delete and prune -------------------------------------------------------------------------------------------------


def test_delete_takes_everything_and_frees_the_key(run: Run) -> None:
    key = uuid4().hex
    id = ended(run, "checkout", "[1]", "--key", key)
    deleted = run("workflow", "delete", id)
    assert (deleted.exit_code, deleted.stdout, deleted.stderr) == (0, f"{id}\n", "")
    assert not is_there(run, id)
    assert start(run, "checkout", "[1]", "--key", key) != id


def test_delete_refuses_what_hasnt_ended(run: Run) -> None:
    id = later(run)
    refused = run("workflow", "delete", id)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "only what has ended can be deleted; cancel or terminate it first" in refused.stderr
    assert is_there(run, id)


def test_delete_by_filter_leaves_what_hasnt_ended(run: Run, mine: str) -> None:
    done, waiting = ended(run, "checkout", "[1]", mine), later(run, mine)
    deleted = run("workflow", "delete", mine, "--yes", "--json")
    assert outcomes(deleted) == [{"id": done, "done": True, "error": None}]
    assert [is_there(run, id) for id in (done, waiting)] == [False, True]


def test_prune_deletes_what_ended_long_enough_ago(aside: Run) -> None:
    done, waiting = later(aside), later(aside)
    aside("workflow", "cancel", done)
    assert aside("workflow", "prune").stdout == "0 workflows deleted\n"
    assert aside("workflow", "prune", "--keep", "1d").stdout == "0 workflows deleted\n"
    assert aside("workflow", "prune", "--keep", "0s", "--dry-run").stdout == "1 workflow would be deleted\n"
    assert json.loads(aside("workflow", "prune", "--keep", "0s", "--dry-run", "--json").stdout) == {
        "expired": 1,
        "deleted": 0,
    }
    assert aside("workflow", "prune", "--keep", "0s", "--name", "delivery").stdout == "0 workflows deleted\n"
    assert is_there(aside, done)
    assert json.loads(aside("prune", "--keep", "0s", "--name", "checkout", "--json").stdout) == {
        "expired": 1,
        "deleted": 1,
    }
    assert [is_there(aside, id) for id in (done, waiting)] == [False, True]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("7", "'7' has no unit; use one such as 7d, 12h or 0s"),
        ("week", "'week' is no duration"),
        ("-1d", "'-1d' is no duration"),
        ("99999d", "'99999d' is longer than 36500 days"),
    ],
)
def test_what_to_keep_needs_a_unit(run: Run, value: str, message: str) -> None:
    refused = run("workflow", "prune", "--keep", value)
    assert refused.exit_code == 2
    assert message in refused.stderr


# --- export and import ------------------------------------------------------------------------------------------------


def test_a_workflow_moves_to_another_database(run: Run, aside: Run) -> None:
    id = ended(run, "checkout", "[7]", "--key", uuid4().hex)
    exported = run("workflow", "export", id)
    assert (exported.exit_code, exported.stderr) == (0, "")
    imported = aside("workflow", "import", "-", input=exported.stdout)
    assert (imported.exit_code, imported.stdout, imported.stderr) == (0, f"{id}\n", "")
    assert aside("workflow", "steps", id).stdout == run("workflow", "steps", id).stdout
    here, there = shown(run, id), shown(aside, id)
    assert there["output"] == "payment-7"
    assert {name for name in here if here[name] != there[name]} <= {"worker_id", "updated_at", "epoch"}


def test_what_hadnt_ended_waits_for_an_operator_who_is_told(run: Run, tmp_path: Path, heard: Heard) -> None:
    id = start(run, "patience", "--arg=order=moved")
    heard.wait(telemetry.WorkflowSuspended, id)
    file = tmp_path / "stuck.json"
    assert run("workflow", "export", id, "--output", str(file)).stdout == ""
    run("workflow", "terminate", id)
    run("workflow", "delete", id)

    imported = run("workflow", "import", str(file))

    assert (imported.exit_code, imported.stdout) == (0, f"{id}\n")
    assert imported.stderr == f"note: it waits for an operator; 'perdure workflow resume {id}' lets it go on\n"
    assert shown(run, id)["waiting_for"] == "operator"
    assert run("workflow", "resume", id).stdout == f"{id}\n"
    heard.wait(telemetry.WorkflowSuspended, id, waiting_for="timer")
    run("workflow", "terminate", id)


def test_an_export_keeps_every_character(run: Run, aside: Run) -> None:
    odd = 'ü – 漢字 🚚 "quoted" \\ \u2028 \x1b[31m'
    id = ended(run, "delivery", json.dumps({"order": odd}))
    exported = run("workflow", "export", id)
    assert "漢字" in exported.stdout, "it is for people, too"
    aside("workflow", "import", "-", input=exported.stdout)
    assert shown(aside, id)["input"] == {"order": odd}


def test_an_export_of_what_isnt_there_writes_no_file(run: Run, tmp_path: Path) -> None:
    missing = run("workflow", "export", MISSING, "--output", str(tmp_path / "none.json"))
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert missing.stderr.startswith(f"perdure: there is no workflow '{MISSING}'")
    assert list(tmp_path.iterdir()) == []


def test_an_export_to_where_nothing_can_be_written_is_one_line(run: Run, tmp_path: Path) -> None:
    id = later(run)
    refused = run("workflow", "export", id, "--output", str(tmp_path / "no" / "such.json"))
    assert refused.exit_code == 1
    assert re.fullmatch(r"perdure: can't write '.*such\.json': No such file or directory\n", refused.stderr)


def test_many_move_as_json_lines(run: Run, aside: Run, mine: str, tmp_path: Path) -> None:
    ids = sorted((ended(run, "checkout", f"[{number}]", mine) for number in range(3)), reverse=True)
    file = tmp_path / "mine.jsonl"
    exported = run("workflow", "export", mine, "--output", str(file))
    assert (exported.exit_code, exported.stdout, exported.stderr) == (0, "", "3 workflows exported\n")
    assert [json.loads(line)["workflow"]["id"] for line in file.read_text().splitlines()] == ids

    aside("migrate")
    listed = aside("workflow", "import", "--dry-run", str(file))
    assert (listed.exit_code, listed.stdout.split(), listed.stderr) == (0, ids, "3 workflows would be imported\n")
    assert not any(is_there(aside, id) for id in ids)

    imported = aside("workflow", "import", str(file))
    assert (imported.exit_code, imported.stdout.split(), imported.stderr) == (0, ids, "3 workflows imported\n")
    assert all(is_there(aside, id) for id in ids)


def test_what_would_be_exported_is_listed(run: Run, mine: str, tmp_path: Path) -> None:
    id = ended(run, "checkout", "[1]", mine)
    listed = run("workflow", "export", mine, "--dry-run")
    assert listed.stdout.splitlines()[1].split() == [id, "checkout", "success"]
    assert listed.stderr == "1 workflow would be exported\n"
    array = run("workflow", "export", mine, "--dry-run", "--json")
    assert json.loads(array.stdout) == [{"id": id, "done": False, "error": None}]
    file = tmp_path / "mine.json"
    array = run("workflow", "export", id, MISSING, "--output", str(file), "--json")
    assert [(row["id"], row["done"]) for row in json.loads(array.stdout)] == [(id, True), (MISSING, False)]
    assert array.exit_code == 1
    assert json.loads(file.read_text())["workflow"]["id"] == id


def test_an_export_says_which_workflows_and_where_to(run: Run) -> None:
    assert "say which workflows" in run("workflow", "export").stderr
    refused = run("workflow", "export", "--all", "--json")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "--json goes with --output or --dry-run" in refused.stderr


def test_of_many_those_that_can_be_imported_are(run: Run, aside: Run, mine: str) -> None:
    first, second = (ended(run, "checkout", f"[{number}]", mine) for number in range(2))
    lines = run("workflow", "export", first, second).stdout
    aside("workflow", "import", "-", input=run("workflow", "export", first).stdout)
    spoilt = '{"perdure": 1, "workflow": {"id": "x"}, "checkpoints": []}\n'
    rehearsed = aside("workflow", "import", "--dry-run", "--json", "-", input=lines + spoilt)
    assert [(row["id"], row["done"]) for row in json.loads(rehearsed.stdout)] == [
        (first, False),
        (second, False),
        (None, False),
    ]
    imported = aside("workflow", "import", "-", input=lines + spoilt)
    assert (imported.exit_code, imported.stdout) == (1, f"{second}\n")
    complaints = imported.stderr.splitlines()
    assert complaints[0] == f"perdure: workflow {first} is there already; nothing is imported"
    assert "give what 'perdure workflow export' wrote" in complaints[1]
    assert complaints[2] == "1 workflow imported"


def test_a_line_that_is_no_json_is_named(run: Run) -> None:
    refused = run("workflow", "import", "-", input='{"perdure": 1}\n{"perdure"\n')
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "stdin, line 2, is no JSON" in refused.stderr


def test_what_is_there_already_isnt_imported_again(run: Run) -> None:
    id = ended(run, "checkout", "[1]")
    again = run("workflow", "import", "-", input=run("workflow", "export", id).stdout)
    assert (again.exit_code, again.stdout) == (1, "")
    assert again.stderr == f"perdure: workflow {id} is there already; nothing is imported\n"


def test_an_import_whose_key_is_taken_says_by_whom(run: Run) -> None:
    key = uuid4().hex
    id = ended(run, "checkout", "[1]", "--key", key)
    exported = run("workflow", "export", id).stdout
    run("workflow", "delete", id)
    holder = ended(run, "checkout", "[2]", "--key", key)
    refused = run("workflow", "import", "-", input=exported)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr == (f"perdure: key '{key}' of workflow 'checkout' is held by {holder}; nothing is imported\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "stdin is no JSON"),
        ("{'id': 1}", "stdin is no JSON"),
        ("[1]", "stdin holds no workflow; give what 'perdure workflow export' wrote"),
        ('{"id": 1}', "stdin holds no workflow; give what 'perdure workflow export' wrote"),
        ('{"perdure": 99, "workflow": {}, "checkpoints": []}', "its format is 99, and this version reads 1"),
        ('{"perdure": 1, "workflow": {"id": "x"}, "checkpoints": []}', "give what 'perdure workflow export' wrote"),
        ('{"perdure": 1, "checkpoints": []}', "give what 'perdure workflow export' wrote"),
    ],
)
def test_what_is_no_export_is_refused(run: Run, text: str, message: str) -> None:
    refused = run("workflow", "import", input=text)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert message in refused.stderr


def test_a_file_that_isnt_there_or_no_text_is_refused(run: Run, tmp_path: Path) -> None:
    missing = run("workflow", "import", str(tmp_path / "none.json"))
    assert missing.exit_code == 2
    assert "none.json' does not exist" in missing.stderr
    (tmp_path / "picture.json").write_bytes(b"\x89PNG\xff\xfe")
    picture = run("workflow", "import", str(tmp_path / "picture.json"))
    assert picture.exit_code == 2
    assert "picture.json' is no JSON" in picture.stderr
    assert run("workflow", "import", str(tmp_path)).exit_code == 2


# --- steps ------------------------------------------------------------------------------------------------------------


def lines(result: Result) -> list[str]:
    assert result.exit_code == 0, result.stderr
    return [" ".join(line.split()) for line in result.stdout.splitlines()[1:]]


WHEN = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


def test_steps_shows_waits_and_until_when(run: Run, heard: Heard) -> None:
    id = start(run, "patience", "--arg=order=waits")
    heard.wait(telemetry.WorkflowSuspended, id)
    (wait,) = lines(run("workflow", "steps", id))
    assert re.fullmatch(rf"sleep\(\) waiting until {WHEN}", wait)
    run("workflow", "terminate", id)


def test_steps_shows_failed_attempts_and_when_the_next_one_is(run: Run, heard: Heard) -> None:
    id = start(run, "visit")
    heard.wait(telemetry.WorkflowSuspended, id, waiting_for="retry")
    over, first, second = lines(run("workflow", "steps", id))
    assert over == "1 sleep() success"
    assert re.fullmatch(r"knock#a1 retrying 1 \d+ ms ValueError: nobody is there", first)
    assert re.fullmatch(rf"knock#a2 retrying 2 \d+ ms ValueError: nobody is there; next attempt {WHEN}", second)
    run("workflow", "terminate", id)


def test_steps_shows_what_waits_for_an_operator_and_what_to_do(run: Run, heard: Heard) -> None:
    id = start(run, "labels", "--arg=order=stuck")
    heard.wait(telemetry.WorkflowSuspended, id, waiting_for="operator")
    shown = run("workflow", "steps", id)
    first, parked = lines(shown)
    assert re.fullmatch(r"print_label#a1 retrying 1 \d+ ms ValueError: no paper", first)
    assert re.fullmatch(r"print_label#a2 parked 2 \d+ ms ValueError: no paper; waits for an operator", parked)
    assert shown.stderr == f"note: 'perdure workflow resume {id}' tries anew what is parked\n"
    run("workflow", "terminate", id)


def test_steps_shows_where_the_code_was_told_to_end(run: Run, heard: Heard) -> None:
    id = start(run, "patience", "--arg=order=told")
    heard.wait(telemetry.WorkflowSuspended, id)
    run("workflow", "cancel", id, "--reason", "too late")
    heard.wait(telemetry.WorkflowEnded, id)
    told, *_ = lines(run("workflow", "steps", id))
    assert told == "1 $cancelled cancelled it was asked to end: too late"


# --- versions ---------------------------------------------------------------------------------------------------------


def shop(database_url: str, schema: str, version: str) -> tuple[App, Workflow[..., None]]:
    """The shop as it was in that version."""
    app = App("shop", database_url=database_url, schema=schema, version=version)

    @app.workflow
    async def checkout(order_id: int) -> None: ...

    return app, checkout


async def test_a_version_that_no_live_worker_takes_is_remarked(aside: Run, elsewhere: str, database_url: str) -> None:
    old, old_checkout = shop(database_url, elsewhere, "old")
    new, new_checkout = shop(database_url, elsewhere, "new")
    hour = timedelta(hours=1)
    async with old, new:
        await old.start(old_checkout(1), delay=hour)
        await old.start(old_checkout(2), queue="nobody's")
        await new.start(new_checkout(3), delay=hour)
        nobody = await asyncio.to_thread(aside, "versions")
        async with new.worker(only_version=True):
            pinned = await asyncio.to_thread(aside, "versions")
            rows = outcomes(await asyncio.to_thread(aside, "versions", "--json"))

    remark = "NO LIVE WORKER takes it; start one of that version, or one without --only-version"
    assert nobody.stdout.splitlines()[0].split() == ["version", "pending", "running", "waiting", "workers", "note"]
    assert lines(nobody) == [f"new 0 0 1 0 {remark}", f"old 1 0 1 0 {remark}"]
    assert lines(pinned) == ["new 0 0 1 1", f"old 1 0 1 0 {remark}"]
    assert rows == [
        {"version": "new", "pending": 0, "running": 0, "waiting": 1, "workers": 1},
        {"version": "old", "pending": 1, "running": 0, "waiting": 1, "workers": 0},
    ]


def test_what_has_no_version_yet_is_shown_as_such(aside: Run) -> None:
    later(aside)
    ((version, *_),) = [line.split("  ") for line in aside("versions").stdout.splitlines()[1:]]
    assert version == "(none yet)"
    assert outcomes(aside("versions", "--json"))[0]["version"] is None


def test_where_everything_has_ended_there_are_no_versions(aside: Run) -> None:
    aside("migrate")
    assert lines(aside("versions")) == []
    assert aside("versions", "--json").stdout == "[]\n"


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_worker_can_be_pinned_to_its_version(
    spawn: Spawn, tmp_path: Path, database_url: str, elsewhere: str, processes: str
) -> None:
    (tmp_path / "pinned.py").write_text(
        f"from perdure import App\napp = App('pinned', schema={elsewhere!r})\n@app.job\nasync def ping(): ...\n"
    )
    worker = spawn("worker", "pinned:app", "--only-version", "--processes", processes)
    for _ in range(int(processes)):
        worker.line(r"worker \S+ runs app 'pinned'")
    with psycopg.connect(database_url, options=f"-c search_path={elsewhere}") as connection:
        found = connection.execute("SELECT only_version FROM workers").fetchall()
    worker.send(signal.SIGTERM)
    assert worker.code() == 0
    assert found == [(True,)] * int(processes)


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(workflow.later))
def test_every_command_shows_examples_and_explains_its_options(run: Run, name: str) -> None:
    command = workflow.later[name].load()
    helped = run("workflow", name, "--help")
    assert helped.exit_code == 0
    assert f"\n    perdure workflow {name}" in helped.stdout
    assert [option.name for option in command.params if isinstance(option, click.Option) and not option.help] == []


def test_the_summary_in_the_list_of_commands_is_that_of_the_command(run: Run) -> None:
    listed = run("workflow", "--help").stdout
    for name, lazy in workflow.later.items():
        assert f"\n  {name} " in listed
        assert (lazy.load().help or "").startswith(lazy.summary)
