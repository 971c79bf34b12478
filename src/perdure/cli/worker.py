"""`perdure worker`: runs the workflows of an app, until a signal."""

from __future__ import annotations

import asyncio
import atexit
import gc
import importlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn

import click

from perdure.app import App
from perdure.cli import logs
from perdure.cli.endings import FAILED
from perdure.cli.health import Health
from perdure.cli.loading import load
from perdure.cli.options import Address, address, app_database_options, duration, given
from perdure.cli.signals import Stopping
from perdure.cli.supervisor import Supervisor, report
from perdure.errors import PerdureError
from perdure.store.database import Interrupted
from perdure.worker import Worker, WorkerOptions

_LEVELS = ["debug", "info", "warning", "error", "critical"]
_MOST_NAMES = 20
_STEP_THREADS = "perdure-"

_log = logging.getLogger("perdure.cli")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """How this process stands to others.

    Attributes:
        health: Where it answers probes.
        supervised: The descriptor of the channel to its supervisor, if it has one.
    """

    health: Address | None
    supervised: int | None


@click.command()
@click.argument("reference", metavar="MODULE[:APP]")
@click.option("--queue", "queues", metavar="NAME", multiple=True, help="A queue to serve; repeatable. [default: all]")
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="How many workflows run at the same time, at most, in each process.",
)
@click.option(
    "--only-version",
    is_flag=True,
    help="Leave workflows that began under another version of the code to workers of that version.",
)
@click.option(
    "--processes", type=click.IntRange(min=1), default=1, show_default=True, help="How many processes; see below."
)
@click.option(
    "--lease",
    type=duration,
    metavar="DURATION",
    default="10s",
    show_default=True,
    help="How long a process may go unheard before others take its workflows over; 1s or more.",
)
@click.option(
    "--grace",
    type=duration,
    metavar="DURATION",
    default="20s",
    show_default=True,
    help="How long steps may go on after SIGTERM. What isn't finished then is handed over.",
)
@click.option(
    "--health",
    type=address,
    metavar="HOST:PORT",
    help="Answer GET /live and /ready there. /ready is 200 while the worker (with --processes: each of them) holds its "
    "lease and claims, else 503; /live is 200 as long as the process is there.",
)
@click.option(
    "--log-level",
    type=click.Choice(_LEVELS, case_sensitive=False),
    default="info",
    show_default=True,
    help="What to log of perdure's own; of everybody else, warnings.",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    help="How to log to stderr. [default: text, or what the app's module has set up with `logging`]",
)
@click.option("--supervised", type=int, hidden=True)
@app_database_options
def worker(
    reference: str,
    queues: tuple[str, ...],
    concurrency: int,
    only_version: bool,
    processes: int,
    lease: timedelta,
    grace: timedelta,
    health: Address | None,
    log_level: str,
    log_format: str | None,
    supervised: int | None,
) -> None:
    """Run the workflows of an app. MODULE alone means the only App in it; the current folder is on the import path.

    SIGTERM and Ctrl-C end it in order, with exit code 0: no new workflows, steps that run may end (--grace), the rest
    is handed over at once. A second signal ends it at once. It waits for a database that is away, as long as it takes.

    A worker takes workflows of all versions of the code, and replays them; with --only-version those of its own alone:
    `perdure versions` shows which ones nobody takes.

    With --processes, one process more starts the others, starts them again when they die, and answers --health.

    Durations are 20, 20s, 500ms, 5m or 1h. --database-url and --schema win over what the app says.

    \b
    Examples:
      perdure worker shop:app
      perdure worker shop --queue eu --queue default --concurrency 500
      perdure worker shop:app --processes 4 --health :8080 --log-format json
      perdure worker shop:app --only-version
    """
    options = WorkerOptions(
        queues=queues or None, concurrency=concurrency, lease=lease, grace=grace, only_version=only_version
    )
    if processes > 1 and supervised is None:
        logs.configure(log_level, log_format or "text", with_pid=True)
        sys.exit(_supervise(reference, options, processes, health, log_level, log_format))
    stopping = Stopping()
    stopping.install()
    app = load(reference)
    logs.configure(log_level, log_format, with_pid=supervised is not None)
    target = given()
    app.settings = replace(
        app.settings,
        database_url=target.database_url or app.settings.database_url,
        schema=target.schema or app.settings.schema,
    )
    _leave(_run(app, options, stopping, _Place(health=health, supervised=supervised)))


def _supervise(
    reference: str,
    options: WorkerOptions,
    processes: int,
    health: Address | None,
    log_level: str,
    log_format: str | None,
) -> int:
    target = given()
    command = [sys.executable, "-P", "-m", "perdure.cli", "worker"]
    for name, value in (
        ("--concurrency", str(options.concurrency)),
        ("--lease", f"{options.lease.total_seconds():f}"),
        ("--grace", f"{options.grace.total_seconds():f}"),
        ("--log-level", log_level),
        ("--log-format", log_format),
        ("--database-url", target.database_url),
        ("--schema", target.schema),
        *(("--queue", queue) for queue in options.queues or ()),
    ):
        if value is not None:
            command.append(f"{name}={value}")
    if options.only_version:
        command.append("--only-version")
    supervisor = Supervisor([*command, reference, "--supervised"], processes)
    if health is not None:
        _answer(health, lambda: supervisor.is_ready)
    return supervisor.run()


def _run(app: App, options: WorkerOptions, stopping: Stopping, place: _Place) -> int:
    """Run a worker in this process; returns the exit code."""
    service = _Service(app, options, stopping)
    if place.health is not None:
        _answer(place.health, lambda: service.is_ready)
    if place.supervised is not None:
        report(place.supervised, lambda: service.is_ready, lambda: stopping.ask("the supervisor is gone"))
    try:
        collect_rarely(options.concurrency)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(service.run())
    except PerdureError:
        raise
    except Exception:
        _log.exception("the worker failed")
        return FAILED
    return 0


def collect_rarely(concurrency: int) -> None:
    """Set the garbage collector for a process that does nothing but run so many workflows at a time.

    What is loaded now stays, and finished workflows free themselves. The collector needs to look only when more has
    been made than what is under way: some fifty objects for each workflow.
    """
    gc.freeze()
    gc.set_threshold(min(max(20_000, 100 * concurrency), 200_000), 20, 100)


class _Service:
    """A worker from its start to its end."""

    def __init__(self, app: App, options: WorkerOptions, stopping: Stopping) -> None:
        self._app = app
        self._options = options
        self._stopping = stopping
        self._asked = asyncio.Event()
        self._worker: Worker | None = None

    @property
    def is_ready(self) -> bool:
        """Whether it holds its lease, and claims. Any thread may ask."""
        worker = self._worker
        return worker is not None and worker.is_ready

    async def run(self) -> None:
        """Work until asked to stop."""
        loop = asyncio.get_running_loop()
        loop.set_default_executor(_Threads(thread_name_prefix=f"{_STEP_THREADS}default"))
        self._stopping.wakes(lambda: _tell(loop, self._asked))
        async with self._app, AsyncExitStack() as stack:
            if await self._unless_asked(self._begin(stack)):
                assert self._worker is not None
                await self._unless_asked(self._worker.ended())
                grace = self._options.grace.total_seconds()
                _log.info("%s: steps may go on for %g s; another signal ends at once", self._stopping.reason, grace)

    async def _begin(self, stack: AsyncExitStack) -> None:
        self._say_what_runs(await self._reach_database())
        self._worker = await stack.enter_async_context(
            self._app.worker(
                queues=self._options.queues,
                concurrency=self._options.concurrency,
                lease=self._options.lease,
                grace=self._options.grace,
                only_version=self._options.only_version,
            )
        )

    async def _unless_asked(self, doing: Any) -> bool:
        """Do it to its end, or until somebody asks to stop; returns whether it came to its end."""
        task = asyncio.ensure_future(doing)
        asking = asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait({task, asking}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                await task
                return True
            return False
        finally:
            task.cancel()
            asking.cancel()
            await asyncio.wait({task, asking})

    async def _reach_database(self) -> str:
        """Wait for the database, for as long as it takes; what is wrong for good is raised. Returns which one it is."""
        database = self._app.session().database
        while True:
            await database.reach("worker")
            with suppress(Interrupted):
                async with database.connection() as connection:
                    info = connection.info
                    server = _version(info.server_version)
                    return f"PostgreSQL {server}, {info.user}@{info.host}:{info.port}/{info.dbname}"

    def _say_what_runs(self, where: str) -> None:
        app, queues = self._app, self._options.queues
        _log.info(
            "app %r: workflows %s; queues: %s; database: %s, schema %s",
            app.name,
            _shortened(app.names),
            "all" if queues is None else ", ".join(queues),
            where,
            app.settings.schema,
            extra={
                "perdure": {
                    "event": "WorkerStarting",
                    "app": app.name,
                    "workflows": app.names,
                    "queues": queues,
                    "database": where,
                    "schema": app.settings.schema,
                }
            },
        )


class _Threads(ThreadPoolExecutor):
    """The loop's default threads; the loop doesn't wait for them when it is closed."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=True)


def _tell(loop: asyncio.AbstractEventLoop, asked: asyncio.Event) -> None:
    with suppress(RuntimeError):  # the loop is closed: the end is near anyway
        loop.call_soon_threadsafe(asked.set)


def _answer(where: Address, is_ready: Callable[[], bool]) -> None:
    found = Health(where, is_ready)
    _log.info("health: http://%s/live and /ready", found.address)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where it is installed."""
    try:
        uvloop: Any = importlib.import_module("uvloop")
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _leave(code: int) -> NoReturn:
    """Exit without waiting for steps in threads that outlived the grace period: others run their workflows by now."""
    for thread in threading.enumerate():
        if thread.name.startswith(_STEP_THREADS) and not thread.daemon:
            thread.join(timeout=0.2)
            if thread.is_alive():
                _log.warning("a step in a thread doesn't end; the process ends without it")
                atexit._run_exitfuncs()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
    sys.exit(code)


def _shortened(names: tuple[str, ...]) -> str:
    if len(names) <= _MOST_NAMES:
        return ", ".join(names)
    return f"{', '.join(names[:_MOST_NAMES])} and {len(names) - _MOST_NAMES} more"


def _version(number: int) -> str:
    return f"{number // 10_000}.{number % 10_000}"
