"""DBOS, with the same workflow.

What was tuned, after reading its documentation and its queue's code (3.4.0):

- by default a queue is polled once a second, and a worker takes all that waits at once;
- `worker_concurrency` bounds that, and `polling_interval_sec` must be short then, since a freed slot is filled by the
  next poll only;
- `sys_db_pool_size` is 20 connections by default; with 50 fewer of its threads wait for one;
- `use_listen_notify` concerns messages and events, not queues; no setting batches its writes.

Plain functions (`sync`) run on threads, without the hop to a thread that each write of an `async` one takes.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dbos import DBOS, DBOSClient, DBOSConfig

from benchmarks.peers import Peer, main
from benchmarks.program import TEXT

QUEUE = "bench"
_STARTERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How it is run."""

    workflow: str
    polling: float = 1.0
    concurrency: int | None = None
    pool: int | None = None


SETTINGS = {
    "default": Setting(workflow="one_step"),
    "tuned": Setting(workflow="one_step", polling=0.01, concurrency=100, pool=50),
    "tuned, sync": Setting(workflow="one_step_sync", polling=0.01, concurrency=100, pool=50),
}

PEER = Peer(
    does="one-step workflow",
    count=400,
    settings=tuple(SETTINGS),
    left="SELECT count(*) FROM dbos.workflow_status WHERE status <> 'SUCCESS'",
    drained="""
        SELECT (max(workflow.completed_at) - min(workflow.started_at_epoch_ms))::float8 / 1000, count(*)
        FROM dbos.workflow_status AS workflow JOIN dbos.operation_outputs USING (workflow_uuid)
        WHERE workflow.status = 'SUCCESS'
        """,
)


@DBOS.step()
async def echo(text: str) -> str:
    return text


@DBOS.workflow()
async def one_step(text: str) -> str:
    return await echo(text)


@DBOS.step()
def echo_sync(text: str) -> str:
    return text


@DBOS.workflow()
def one_step_sync(text: str) -> str:
    return echo_sync(text)


def _with_driver(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://")


def launch(url: str, setting: Setting, *, works: bool) -> None:
    """DBOS in this process; its queue, with the setting."""
    config: DBOSConfig = {
        "name": "benchmarks",
        "system_database_url": _with_driver(url),
        "application_version": "1",
        "executor_id": "bench",
        "log_level": "ERROR",
        "sys_db_pool_size": setting.pool,
    }
    DBOS(config=config)
    DBOS.listen_queues([QUEUE] if works else [])
    DBOS.launch()
    DBOS.register_queue(QUEUE, polling_interval_sec=setting.polling, worker_concurrency=setting.concurrency)


def start(url: str, setting: Setting, count: int) -> None:
    """Start a backlog, as a client."""
    launch(url, setting, works=False)
    client = DBOSClient(system_database_url=_with_driver(url))
    with ThreadPoolExecutor(_STARTERS) as threads:
        for _ in range(count):
            threads.submit(
                client.enqueue, {"queue_name": QUEUE, "workflow_name": setting.workflow, "app_version": "1"}, TEXT
            )
    client.destroy()
    DBOS.destroy()


def work(url: str, setting: Setting) -> None:
    """Be a worker until stdin ends."""
    launch(url, setting, works=True)
    print("works", flush=True)
    sys.stdin.read()
    DBOS.destroy()


if __name__ == "__main__":
    main(SETTINGS, start, work)
