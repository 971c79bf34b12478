"""`perdure workflow`: its commands, each of which is imported when it is called."""

from __future__ import annotations

import click

from perdure.cli.commands import Commands, Lazy
from perdure.cli.options import database_options

_LATER = {
    "cancel": Lazy("perdure.cli.manage:cancel", "Ask workflows to end: their code may clean up."),
    "delete": Lazy("perdure.cli.manage:delete", "Delete workflows that have ended."),
    "export": Lazy("perdure.cli.transfer:export", "Write workflows as JSON, with all that they recorded."),
    "fork": Lazy("perdure.cli.forking:fork", "Start a copy of a workflow that goes on behind a step."),
    "import": Lazy("perdure.cli.transfer:import_", "Bring in workflows that were exported."),
    "list": Lazy("perdure.cli.look:list_", "List workflows, newest first."),
    "prune": Lazy("perdure.cli.manage:prune", "Delete what has been over for longer than it is kept."),
    "resume": Lazy("perdure.cli.manage:resume", "Let workflows go on from their last checkpoint."),
    "rewind": Lazy("perdure.cli.forking:rewind", "Let a workflow that has ended go on behind a step, in place."),
    "send": Lazy("perdure.cli.send:send", "Send a message to a workflow, which gets it by recv(TOPIC)."),
    "show": Lazy("perdure.cli.look:show_", "Show a workflow: where it stands, its input, and its output or its error."),
    "start": Lazy("perdure.cli.start:start", "Start a workflow and print its id."),
    "steps": Lazy(
        "perdure.cli.look:steps", "List the steps of a workflow, in the order in which its code got their outcomes."
    ),
    "stream": Lazy("perdure.cli.stream:stream", "Print the entries of a stream as they come."),
    "terminate": Lazy(
        "perdure.cli.manage:terminate", "End workflows at once: no more of their code runs, not even to clean up."
    ),
}


@click.group(cls=Commands, later=_LATER)
@database_options
def workflow() -> None:
    """List, show, start and manage workflows. Needs none of their code.

    \b
    Examples:
      perdure workflow list --status error --since 1h
      perdure workflow show 0199f0c2-7c5e-7d3a-9a51-3f0c2a7be001
      perdure workflow start checkout '{"order_id": 42}' --key order-42 --wait
      perdure workflow resume --status error --name checkout --since 1h
    """
