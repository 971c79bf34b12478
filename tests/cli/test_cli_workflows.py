"""`perdure workflow`, on an app whose worker lives in a thread of the test."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
from processes import PERDURE, Run, Spawn

from perdure import App, Retry, recv, step, write_stream
from perdure.cli import tables
from perdure.embedded import Cluster

MISSING = "01a206e8-b5f0-76e2-a285-1162a825003a"
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Declined(Exception):
    pass


@step
async def charge(order_id: int) -> str:
    return f"payment-{order_id}"


@step(retry=Retry(max_attempts=2))
async def decline() -> None:
    raise Declined("no \x1b[31mfunds")


@pytest.fixture(scope="module")
def schema(cluster: Cluster) -> Iterator[str]:
    """One schema for all tests here, with a worker."""
    name = f"test_{uuid4().hex[:12]}"
    app = App("shop", database_url=cluster.url, schema=name)

    @app.workflow
    async def checkout(order_id: int, *, note: str = "") -> dict[str, Any]:
        return {"payment": await charge(order_id), "note": note}

    @app.workflow
    async def declines() -> None:
        await charge(1)
        await decline()

    @app.workflow
    async def speaks() -> None:
        await write_stream("words", "hello")
        await write_stream("words", {"n": 1})

    @app.workflow
    async def listens() -> list[Any]:
        return [await recv("numbers"), await recv("numbers")]

    @app.workflow
    async def breaks() -> None:
        raise ValueError("out of range")

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


# --- start ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["""{"order_id": 42, "note": "ü"}"""],
        ["[42]", "--arg", "note=ü"],
        ["--arg", "order_id=42", "--arg", 'note="ü"'],
        ['{"order_id": 1}', "--arg", "order_id=42", "--arg", "note=ü"],
    ],
)
def test_start_waits_and_prints_the_result_as_json(run: Run, arguments: list[str]) -> None:
    done = run("workflow", "start", "checkout", *arguments, "--wait")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == '{"payment": "payment-42", "note": "ü"}\n'
    assert UUID.fullmatch(done.stderr.strip())


def test_start_reads_arguments_from_stdin(run: Run) -> None:
    done = run("workflow", "start", "checkout", "-", "--wait", input='{"order_id": 7}')
    assert json.loads(done.stdout)["payment"] == "payment-7"


def test_start_prints_the_id_alone_and_a_key_makes_it_idempotent(run: Run) -> None:
    first = run("workflow", "start", "checkout", "[1]", "--key", "start-1")
    again = run("workflow", "start", "checkout", "[1]", "--key", "start-1")
    other = run("workflow", "start", "checkout", "[1]", "--key", "start-1", "--on-conflict", "raise")
    assert UUID.fullmatch(first.stdout.strip())
    assert (first.stderr, again.stdout) == ("", first.stdout)
    assert again.stderr == "note: key 'start-1' is held by this workflow, which was started before\n"
    assert (other.exit_code, other.stdout) == (1, "")
    assert other.stderr.startswith("perdure: key 'start-1' of workflow 'checkout' is held by")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("breaks", "ValueError: out of range"),
        ("declines", "test_cli_workflows.Declined: no"),
        ("checkout", "perdure.errors.InvalidArguments: invalid arguments for workflow 'checkout'"),
    ],
)
def test_a_workflow_that_failed_is_exit_code_1_and_one_line(run: Run, name: str, what: str) -> None:
    failed = run("workflow", "start", name, "--wait")
    assert (failed.exit_code, failed.stdout) == (1, "")
    id, line = failed.stderr.splitlines()
    assert line.startswith(f"perdure: workflow {id} failed with {what}")
    assert line.endswith(f"'perdure workflow show {id}' shows more")


def test_a_result_that_isnt_there_in_time_is_exit_code_4(run: Run) -> None:
    late = run("workflow", "start", "checkout", "[1]", "--delay", "1h", "--wait", "--timeout", "10ms")
    assert (late.exit_code, late.stdout) == (4, "")
    id, line = late.stderr.splitlines()
    assert line == f"perdure: workflow {id} hasn't ended yet; it goes on, and result() may be called again"


def test_start_takes_the_options_of_a_start(run: Run, sql: Callable[..., list[Any]]) -> None:
    id = run(
        "workflow", "start", "checkout", "[1]", "--queue", "elsewhere", "--priority", "3", "--delay", "1h30m",
        "--attribute", "tenant=acme", "--attribute", 'tags=["a", 1]',
    ).stdout.strip()  # fmt: skip
    query = "SELECT status, queue, priority, attributes, wake_at - created_at FROM workflows WHERE id = %s"
    ((status, queue, priority, attributes, delay),) = sql(query, id)
    assert (status, queue, priority) == ("waiting", "elsewhere", 3)
    assert attributes == {"tenant": "acme", "tags": ["a", 1]}
    assert delay.total_seconds() == 5400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkout", "{order_id: 1}"], "Invalid value for ARGUMENTS: it is no JSON"),
        (["checkout", "NaN"], "Invalid value for ARGUMENTS: it is no JSON: NaN is no JSON"),
        (["checkout", "42"], 'give an object or an array, such as {"order_id": 42}'),
        (["checkout", "--arg", "order_id"], "'order_id' is no pair; use name=value"),
        (["checkout", "--timeout", "1s"], "--timeout goes with --wait"),
        (["checkout", "--key", ""], "key='' is no key"),
        (["checkout", "--priority", "3000000000"], "priority=3000000000 is out of range"),
        (["a/b"], "workflow name 'a/b' must not begin with '$'"),
        (["checkout", '{"$args": 1}'], "no argument can be named '$args'"),
        ([], "Missing argument 'NAME'"),
    ],
)
def test_a_start_that_makes_no_sense_is_refused(run: Run, arguments: list[str], message: str) -> None:
    refused = run("workflow", "start", *arguments)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert message in refused.stderr


# --- send -------------------------------------------------------------------------------------------------------------


def test_a_message_is_sent_as_json_and_once_under_a_key(run: Run) -> None:
    id = run("workflow", "start", "listens", "--key", "once").stdout.strip()
    for value in ("first", "second"):
        result = run("workflow", "send", id, "numbers", f'"{value}"', "--idempotency-key", "a")
        assert (result.exit_code, result.output) == (0, "")
    assert run("workflow", "send", id, "numbers", "-", input='{"n": 2}').exit_code == 0
    waited = run("workflow", "start", "listens", "--key", "once", "--wait")
    assert json.loads(waited.stdout) == ["first", {"n": 2}]
    result = run("workflow", "send", id, "numbers", "3")
    assert result.exit_code == 1
    assert "it has ended, and receives nothing any more" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([MISSING, "numbers", "1"], 1, "no workflow"),
        (["none", "numbers", "1"], 2, "none"),
        ([MISSING, "numbers", "one"], 2, "it is no JSON"),
        ([MISSING, "a/b", "1"], 2, "topic name 'a/b'"),
    ],
)
def test_a_message_that_cannot_be_sent_is_one_line(run: Run, arguments: list[str], code: int, message: str) -> None:
    result = run("workflow", "send", *arguments)
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr


# --- stream -----------------------------------------------------------------------------------------------------------


def test_the_entries_of_a_stream_are_lines_of_json(run: Run) -> None:
    id = run("workflow", "start", "speaks").stdout.strip()
    result = run("workflow", "stream", id, "words")
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {"offset": 0, "step": "", "attempt": 1, "value": "hello"},
        {"offset": 1, "step": "", "attempt": 1, "value": {"n": 1}},
    ]
    assert run("workflow", "stream", id, "words", "--offset", "2").output == ""
    assert run("workflow", "stream", MISSING, "words").exit_code == 1


# --- fork and rewind --------------------------------------------------------------------------------------------------


def test_a_workflow_goes_on_from_a_step_in_a_copy_and_in_place(run: Run) -> None:
    id = finished(run, 41)
    fork = run("workflow", "fork", id, "--patch", 'charge="a gift"')
    assert (fork.exit_code, fork.stderr) == (0, "")
    assert UUID.fullmatch(fork.stdout.strip())
    assert shown(run, fork.stdout.strip())["forked_from"] == id
    rewound = run("workflow", "rewind", id, "--after", "$input")
    assert (rewound.exit_code, rewound.stdout) == (0, f"{id}\n")


@pytest.mark.parametrize("command", ["fork", "rewind"])
def test_what_cannot_be_forked_or_rewound_is_one_line(run: Run, command: str) -> None:
    id = finished(run, 42)
    result = run("workflow", command, id, "--after", "refund")
    assert result.exit_code == 1
    assert "has no step 'refund' there; there are: charge" in result.stderr
    assert run("workflow", command, MISSING).exit_code == 1


def finished(run: Run, order_id: int) -> str:
    id = run("workflow", "start", "checkout", f'{{"order_id": {order_id}}}', "--key", f"fork-{order_id}").stdout.strip()
    assert run("workflow", "start", "checkout", f'{{"order_id": {order_id}}}', "--key", f"fork-{order_id}", "--wait")
    return str(id)


def shown(run: Run, id: str) -> Any:
    return json.loads(run("workflow", "show", id, "--json").stdout)


# --- list -------------------------------------------------------------------------------------------------------------


def start(run: Run, *arguments: str) -> str:
    return str(run("workflow", "start", *arguments, "--wait").stderr.splitlines()[0])


def ids(run: Run, *arguments: str) -> list[str]:
    listed = run("workflow", "list", "--json", *arguments)
    assert listed.exit_code == 0, listed.stderr
    return [row["id"] for row in json.loads(listed.stdout)]


def test_list_finds_workflows_newest_first_by_each_filter(run: Run) -> None:
    first = start(run, "checkout", "[1]", "--key", "list-1", "--attribute", "batch=17", "--attribute", "kind=a")
    second = start(run, "checkout", "[2]", "--key", "list-2", "--attribute", "batch=17", "--attribute", "kind=b")
    failed = start(run, "breaks", "--attribute", "batch=17")
    mine = ["--attribute", "batch=17"]

    assert ids(run, *mine) == [failed, second, first]
    assert ids(run, *mine, "--limit", "2") == [failed, second]
    assert ids(run, *mine, "--status", "error") == [failed]
    assert ids(run, *mine, "--name", "checkout") == [second, first]
    assert ids(run, *mine, "--key-prefix", "list-") == [second, first]
    assert ids(run, *mine, "--attribute", "kind=b") == [second]
    assert ids(run, *mine, "--queue", "eu") == []
    assert ids(run, *mine, "--since", "1h", "--until", "2100-01-01") == [failed, second, first]
    assert ids(run, *mine, "--since", "2100-01-01T00:00:00Z") == ids(run, *mine, "--until", "1h") == []


def test_list_is_one_array_of_whole_rows_for_programs(run: Run) -> None:
    id = start(run, "checkout", "[5]", "--key", "rows", "--attribute", "a=1")
    (row,) = json.loads(run("workflow", "list", "--json", "--key-prefix", "rows").stdout)
    assert row | {"version": None} == row | {
        "id": id, "name": "checkout", "key": "rows", "status": "success", "queue": "default", "epoch": 1,
        "input": {"$args": [5]}, "output": {"payment": "payment-5", "note": ""}, "error": None, "attributes": {"a": 1},
        "version": None,
    }  # fmt: skip
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", row["created_at"])
    assert run("workflow", "list", "--json", "--name", "nothing").stdout == "[]\n"


def test_list_is_plain_columns_for_people_without_a_terminal(run: Run) -> None:
    key = "k" * 200
    failed = start(run, "declines", "--key", key)
    waiting = run("workflow", "start", "checkout", "[1]", "--delay", "1h", "--key", f"{key}2").stdout.strip()
    header, *lines = run("workflow", "list", "--key-prefix", key).stdout.splitlines()
    assert header.split() == ["id", "name", "status", "queue", "key", "created", "took", "note"]
    assert len(lines) == 2
    assert lines[0].startswith(f"{waiting}  checkout  waiting  default  {key}2  ")
    assert " for start until 2" in lines[0]
    assert lines[1].startswith(f"{failed}  declines  error    default  {key}   ")
    assert lines[1].endswith(r"test_cli_workflows.Declined: no \x1b[31mfunds"), "an escape sequence came through"


@pytest.mark.parametrize("width", ["200", "100", "60", "20"])
def test_list_on_a_terminal_never_cuts_the_id(
    width: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", width)
    titles = ("name", "status", "queue", "key", "created", "took", "note")
    columns = [tables.Column("id", whole=True), *map(tables.Column, titles)]
    row = [
        MISSING,
        "a-workflow-with-a-long-name",
        "success",
        "default",
        "k" * 50,
        "2026-01-31 12:00:00",
        "1.2 s",
        "[b]",
    ]
    tables.show(columns, [row, row])
    shown = [line for line in capsys.readouterr().out.splitlines() if MISSING in line]
    assert len(shown) == 2
    if width == "200":
        assert "a-workflow-with-a-long-name" in shown[0]
        assert "[b]" in shown[0]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--since", "yesterday", "'yesterday' is no instant; use 2026-01-31T12:00:00Z, or a duration ago such as 1h"),
        ("--status", "done", "'done' is not one of"),
        ("--attribute", "tenant", "'tenant' is no pair; use name=value"),
        ("--limit", "0", "0 is not in the range x>=1"),
    ],
)
def test_a_filter_that_makes_no_sense_is_refused(run: Run, option: str, value: str, message: str) -> None:
    refused = run("workflow", "list", option, value)
    assert refused.exit_code == 2
    assert message in refused.stderr


# --- show and steps ---------------------------------------------------------------------------------------------------


def test_show_has_input_and_output(run: Run) -> None:
    id = start(run, "checkout", "[9]", "--key", "show-1")
    shown = run("workflow", "show", id).stdout
    assert re.search(rf"^id +{id}\nname +checkout\nkey +show-1\nstatus +success\n", shown)
    assert 'output\n  {\n    "note": "",\n    "payment": "payment-9"\n  }' in shown
    assert json.loads(run("workflow", "show", id, "--json").stdout)["output"]["payment"] == "payment-9"


def test_show_has_the_error_with_its_traceback(run: Run) -> None:
    id = start(run, "breaks")
    shown = run("workflow", "show", id).stdout
    assert "error\n  ValueError: out of range\ntraceback\n  Traceback (most recent call last):\n" in shown
    assert 'raise ValueError("out of range")' in shown


def test_steps_stand_in_order(run: Run) -> None:
    id = start(run, "declines")
    header, *lines = run("workflow", "steps", id).stdout.splitlines()
    assert header.split() == ["position", "key", "status", "attempts", "took", "output"]
    first, *_, last = (line.split(maxsplit=4) for line in lines)
    assert first[1:4] == ["charge", "success", "1"]
    assert first[4].endswith(' ms  "payment-1"')
    assert last[1:4] == ["decline", "error", "2"]
    rows = json.loads(run("workflow", "steps", id, "--json").stdout)
    assert (rows[0]["key"], rows[0]["output"], rows[-1]["error"]["attempts"]) == ("charge", "payment-1", 2)


def test_a_workflow_without_steps_has_none(run: Run) -> None:
    assert run("workflow", "steps", start(run, "breaks"), "--json").stdout == "[]\n"


@pytest.mark.parametrize("command", ["show", "steps"])
def test_a_workflow_that_isnt_there_is_one_line(run: Run, command: str) -> None:
    missing = run("workflow", command, MISSING)
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert missing.stderr.startswith(f"perdure: there is no workflow '{MISSING}'; check the id and the schema")
    assert run("workflow", command, "42").exit_code == 2


def test_looking_makes_no_schema(run: Run, sql: Callable[..., list[Any]]) -> None:
    other = f"test_{uuid4().hex[:12]}"
    looked = run("workflow", "--schema", other, "list")
    assert looked.exit_code == 2
    assert re.match(rf"perdure: schema '{other}' lacks .*; run 'perdure migrate'\n$", looked.stderr)
    assert sql("SELECT 1 FROM pg_namespace WHERE nspname = %s", other) == []


# --- endings ----------------------------------------------------------------------------------------------------------


def test_a_reader_that_goes_away_is_no_error(run: Run, environment: dict[str, str]) -> None:
    start(run, "checkout", "[1]", "--arg", f"note={'x' * 200_000}", "--key", "long")
    command = [PERDURE, "workflow", "list", "--json", "--key-prefix", "long"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as listing:
        assert listing.stdout is not None
        assert listing.stderr is not None
        listing.stdout.close()
        assert listing.stderr.read() == b""


def test_ctrl_c_is_quiet(spawn: Spawn) -> None:
    waiting = spawn("workflow", "start", "checkout", "[1]", "--delay", "1h", "--wait")
    id = waiting.line(UUID.pattern)[0]
    waiting.send(signal.SIGINT)
    assert waiting.code() == 130
    assert waiting.output() == id
