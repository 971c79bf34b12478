"""Absurd, with the same workflow: one task of one step.

What was tuned, after reading its SDK (0.5.1): a worker has one connection, claims `batch_size` tasks in a statement and
by default polls four times a second; so a large batch and a short poll. The worker without threads is the fastest: with
`concurrency`, its threads wait for the one connection.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from typing import Any

import absurdctl
import psycopg
from absurd_sdk import Absurd, TaskContext

from benchmarks.peers import Peer, main
from benchmarks.program import TEXT

QUEUE = "bench"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How it is run."""

    concurrency: int = 1
    batch: int | None = None
    polling: float = 0.25


SETTINGS = {
    "default": Setting(),
    "tuned": Setting(batch=100, polling=0.01),
    "tuned, 10 threads": Setting(concurrency=10, batch=100, polling=0.01),
}
PEER = Peer(
    does="one-step workflow",
    count=1_000,
    settings=tuple(SETTINGS),
    left=f"SELECT count(*) FROM absurd.t_{QUEUE} WHERE state <> 'completed'",
    drained=f"""
        SELECT extract(epoch FROM max(run.completed_at) - min(run.started_at))::float8, count(*)
        FROM absurd.r_{QUEUE} AS run JOIN absurd.c_{QUEUE} AS step USING (task_id)
        WHERE run.state = 'completed'
        """,
)


def start(url: str, setting: Setting, count: int) -> None:
    """Start a backlog, as a client."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(absurdctl.BUNDLED_SCHEMA_SQL.encode())
    client = Absurd(url, queue_name=QUEUE)
    client.create_queue()
    for _ in range(count):
        client.spawn("one_step", {"text": TEXT}, queue=QUEUE)
    client.close()


def work(url: str, setting: Setting) -> None:
    """Be a worker until stdin ends."""
    worker = Absurd(url, queue_name=QUEUE)

    @worker.register_task("one_step")
    def one_step(params: Any, context: TaskContext) -> Any:
        return context.step("echo", lambda: params["text"])

    def end_with_stdin() -> None:
        sys.stdin.read()
        worker.stop_worker()

    threading.Thread(target=end_with_stdin, daemon=True).start()
    print("works", flush=True)
    worker.start_worker(concurrency=setting.concurrency, batch_size=setting.batch, poll_interval=setting.polling)


if __name__ == "__main__":
    main(SETTINGS, start, work)
