"""Writes the reference pages from the docstrings; a test says whether they are current.

python tests/docs/reference.py
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import click

import perdure
import perdure.testing
from perdure import telemetry
from perdure.cli import cli
from perdure.config import Settings

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"

SECTIONS = {
    "Declaring": ["App", "step", "workflow", "Step", "Workflow", "Invocation", "Retry", "RetryAfter", "Rerun"],
    "Starting and looking": ["Client", "Start", "Handle", "Status", "WorkflowInfo", "StepInfo"],
    "In workflow code": [
        "current",
        "sleep",
        "sleep_until",
        "timeout",
        "now",
        "random",
        "uuid4",
        "run_step",
        "patched",
        "as_completed",
        "map",
        "recv",
        "send",
        "set_event",
        "get_event",
        "answering",
        "Question",
        "write_stream",
        "StreamEntry",
        "StreamReset",
        "set_attributes",
        "continue_as_new",
        "saga",
        "Saga",
    ],
    "Payloads": ["Codec"],
}
VERBS = {
    "App": ["workflow", "job", "transaction", "register", "worker", "blocking"],
    "Client": [
        "start",
        "start_many",
        "run",
        "start_or_send",
        "handle",
        "find",
        "workflows",
        "cancel_many",
        "terminate_many",
        "resume_many",
        "delete_many",
        "fork",
        "rewind",
        "prune",
        "export",
        "import_",
        "close",
    ],
    "Handle": [
        "result",
        "status",
        "describe",
        "steps",
        "cancel",
        "terminate",
        "resume",
        "send",
        "get_event",
        "read_stream",
        "ask",
        "delete",
    ],
    "Step": ["with_options"],
}
TESTING = {
    "perdure_app": [],
    "Kit": [
        "idle",
        "run",
        "finish",
        "fake",
        "replay",
        "crash_everywhere",
        "crash",
        "start_worker",
        "stop_worker",
        "worker",
        "lease",
    ],
    "Clock": ["advance", "now", "next_due"],
    "fake": [],
    "Fake": ["restore"],
    "Called": [],
    "CrashReport": [],
    "CrashFailure": [],
    "TestBed": [],
    "BlockingKit": [],
    "BlockingClock": [],
}
VARIABLES = {
    "PERDURE_DATABASE_URL": "the database, where no argument says it",
    "PERDURE_TEST_DATABASE_URL": "the server for tests (`perdure.testing`); without it, the embedded one",
    "PERDURE_SCHEMA": "the schema, for commands that name no app; an app says its own",
    "PERDURE_MIGRATE": "`off`: the schema isn't brought up to date at first use; run `perdure migrate`",
    "PERDURE_EMBEDDED": "`off`: never start the embedded PostgreSQL; `on`: also under Kubernetes",
    "PERDURE_EMBEDDED_DIR": "where the data of embedded servers lives",
    "PERDURE_EMBEDDED_BINARIES": "the folder of another PostgreSQL's `initdb` and `postgres` for the embedded server",
}


def python() -> str:
    """docs/reference/python.md"""
    lines = [
        "# Python",
        "",
        "Everything is imported from `perdure`. Durations are `timedelta`, instants aware `datetime`; options are",
        "keyword-only. `app.blocking` has the verbs of `App` and `Handle` without `await`.",
    ]
    for title, names in SECTIONS.items():
        lines += ["", f"## {title}"]
        for name in names:
            thing = getattr(perdure, name)
            lines += ["", f"### `{name}`", "", _prose(thing)]
            for verb in VERBS.get(name, ()):
                lines += ["", f"#### `{name}.{verb}`", "", _prose(_member(thing, verb))]
    lines += ["", "## Errors", "", "```text", inspect.cleandoc(perdure.errors.__doc__ or ""), "```"]
    for name, error in sorted(errors().items()):
        lines += ["", f"### `{name}`", "", _prose(error)]
    lines += ["", "## Settings", "", _prose(Settings), "", "| variable | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in VARIABLES.items()]
    return "\n".join(lines) + "\n"


def testing() -> str:
    """docs/reference/testing.md"""
    lines = [
        "# Testing",
        "",
        "Everything is imported from `perdure.testing`; [Test workflows](../how-to/test-workflows.md) has examples.",
        "pytest finds the fixture `perdure_app` by itself.",
    ]
    for name, verbs in TESTING.items():
        thing = getattr(perdure.testing, name)
        lines += ["", f"## `{name}`", "", _prose(thing)]
        for verb in verbs:
            lines += ["", f"### `{name}.{verb}`", "", _prose(_member(thing, verb))]
    return "\n".join(lines) + "\n"


def events() -> str:
    """docs/reference/events.md"""
    lines = [
        "# Events",
        "",
        "`perdure.telemetry.subscribe(callback)` calls it with every event, in the thread where it happens, and",
        "returns what ends that. The same events go to the logger `perdure`, each with its fields as",
        "`record.perdure`. No event carries a payload.",
        "",
        "| event | level | fields | |",
        "|---|---|---|---|",
    ]
    for name, kind in event_classes().items():
        fields = ", ".join(f"`{field.name}`" for field in dataclasses.fields(kind))
        doc = "" if (kind.__doc__ or "").startswith(f"{name}(") else _one_line(kind.__doc__ or "")
        lines.append(f"| `{name}` | {logging.getLevelName(kind.level)} | {fields} | {doc} |")
    return "\n".join(lines) + "\n"


def command_line() -> str:
    """docs/reference/command-line.md"""
    lines = ["# Command line", ""]
    for context in contexts(cli, "perdure", None):
        lines += [f"## `{context.command_path}`", "", "```text", context.get_help(), "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def contexts(command: click.Command, name: str, parent: click.Context | None) -> list[click.Context]:
    """A command and all below it, each as it is when it is called by that name."""
    context = click.Context(
        command, info_name=name, parent=parent, terminal_width=100, max_content_width=100, **command.context_settings
    )
    found = [context]
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            below = command.get_command(context, inner)
            assert below is not None
            found += contexts(below, inner, context)
    return found


def errors() -> dict[str, type[perdure.PerdureError]]:
    named = {name: getattr(perdure, name) for name in perdure.__all__}
    return {
        name: thing
        for name, thing in named.items()
        if inspect.isclass(thing) and issubclass(thing, perdure.PerdureError)
    }


def event_classes() -> dict[str, type[telemetry.Event]]:
    return {
        name: thing
        for name, thing in vars(telemetry).items()
        if inspect.isclass(thing) and issubclass(thing, telemetry.Event) and thing is not telemetry.Event
    }


PAGES = {"python.md": python, "testing.md": testing, "events.md": events, "command-line.md": command_line}


def _member(thing: Any, name: str) -> Any:
    return inspect.getattr_static(thing, name)


def _prose(thing: Any) -> str:
    """A docstring as Markdown: its sections of arguments, attributes and errors as lists."""
    doc = inspect.cleandoc(getattr(thing, "__doc__", None) or "")
    parts: list[str] = []
    for block in re.split(r"\n\n", doc):
        head, _, rest = block.partition("\n")
        if head in ("Args:", "Attributes:", "Raises:", "Example:") and rest:
            items = re.split(r"\n(?=\S)", textwrap.dedent(rest))
            bullets = [_bullet(item) for item in items]
            parts.append(f"{'Arguments' if head == 'Args:' else head[:-1]}:\n\n" + "\n".join(bullets))
        elif head == "Returns:":
            parts.append(f"Returns: {_one_line(rest)}")
        else:
            parts.append(block)
    return "\n\n".join(parts)


def _bullet(item: str) -> str:
    name, _, meaning = _one_line(item).partition(": ")
    return f"- `{name}`: {meaning}"


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


if __name__ == "__main__":
    for page, write in PAGES.items():
        if "--print" in sys.argv:
            sys.stdout.buffer.write(write().encode() if page in sys.argv else b"")
        else:
            (REFERENCE / page).write_text(write(), encoding="utf-8")
