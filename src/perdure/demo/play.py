"""The demo from start to end: start the workflows, kill a worker in the middle, look on, and prove it."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import string
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from perdure import Client
from perdure.config import Settings
from perdure.demo import proof, stage
from perdure.demo.program import ingest
from perdure.demo.screen import Screen
from perdure.demo.stage import SCHEMA, Connection
from perdure.demo.worker_process import LEASE
from perdure.demo.workers import Broken, WorkerProcess
from perdure.embedded import embedded_url

MOST_WORKERS = 8
_LOOK_SECONDS = 0.05
_STALLED_SECONDS = 60.0

FAILED_STEPS = "SELECT * FROM workflow_steps WHERE status = 'error' AND created_at > now() - interval '1 month'"
PENDING = "SELECT * FROM workflows WHERE status = 'pending' ORDER BY created_at LIMIT 10"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to happen.

    Attributes:
        database_url: A PostgreSQL URL. None: `PERDURE_DATABASE_URL`, else the embedded server.
        files: How many files to ingest.
        workers: How many worker processes there are.
        kill: Whether one of them is killed.
        keep: Whether the schema stays.
    """

    database_url: str | None
    files: int
    workers: int
    kill: bool
    keep: bool


def perform(plan: Plan) -> bool:
    """The whole of it; returns whether the proof holds.

    Raises:
        ConfigurationError: It can't begin.
        Broken: It couldn't go on.
    """
    url = Settings(database_url=plan.database_url).url() or embedded_url()
    folder = Path(tempfile.mkdtemp(prefix="perdure-demo-"))
    try:
        with stage.connect(url) as connection:
            play = Play(plan, url, connection, folder)
            stage.set_up(connection)
            proven = play.run()
            if proven and not plan.keep:
                stage.tear_down(connection)
            else:
                play.screen.say(f"\nEverything is still there, in schema {SCHEMA}; the next demo drops it.")
            return proven
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Play:
    """One performance."""

    def __init__(self, plan: Plan, url: str, connection: Connection, folder: Path) -> None:
        self.plan = plan
        self.screen = Screen()
        self._url = url
        self._connection = connection
        self._folder = folder
        self._sources = stage.source_files()
        self._workers: list[WorkerProcess] = []
        self._victim: WorkerProcess | None = None
        self._victim_id: UUID | None = None
        self._in_flight: list[UUID] = []
        self._killed_at = 0.0
        self._settled = False
        self._taken_over = 0
        self._pending_shown = False
        self._seconds = 0.0

    def run(self) -> bool:
        """Returns whether the proof holds."""
        self._start_workflows()
        try:
            self._start_workers()
            self._look_on()
        finally:
            for worker in self._workers:
                worker.end()
            for worker in self._workers:
                worker.ended()
        return self._prove()

    # --- the beginning ---------------------------------------------------------------------------------------------

    def _start_workflows(self) -> None:
        files, say = self.plan.files, self.screen.say
        say(f"Ingesting {files:,} source files: the {len(self._sources):,} of {stage.LIBRARY}, over again if need be.")
        began = time.monotonic()
        asyncio.run(self._start_all())
        seconds = time.monotonic() - began
        say(f"{files:,} workflows started in {seconds:.1f} s, one a file: rows, which will run to their end.")

    async def _start_all(self) -> None:
        paths = itertools.islice(itertools.cycle(self._sources), self.plan.files)
        async with Client(self._url, schema=SCHEMA) as client:
            await client.start_many(ingest(ordinal, path) for ordinal, path in enumerate(paths))

    def _start_workers(self) -> None:
        names = ", ".join(str(self._start_worker()) for _ in range(self.plan.workers))
        self.screen.say(f"Started {names}; their lease is {LEASE.total_seconds():g} s.")

    def _start_worker(self) -> WorkerProcess:
        worker = WorkerProcess(string.ascii_uppercase[len(self._workers)], self._url, self._folder)
        self._workers.append(worker)
        return worker

    # --- the middle ------------------------------------------------------------------------------------------------

    def _look_on(self) -> None:
        """Until everything is done; looks several times a second."""
        files = self.plan.files
        done = 0
        began = moved = time.monotonic()
        with self.screen.progress(files) as tell:
            while done < files:
                time.sleep(_LOOK_SECONDS)
                for worker in self._workers:
                    if worker is not self._victim:
                        worker.check()
                before, done = done, self._done()
                moved = time.monotonic() if done > before else moved
                if time.monotonic() - moved > _STALLED_SECONDS:
                    raise Broken(f"nothing has moved for {_STALLED_SECONDS:g} s:\n{self._workers[-1].last_words()}")
                tell(done)
                if files > done >= files / 2:
                    self._interfere()
        self._seconds = time.monotonic() - began

    def _done(self) -> int:
        """How many workflows have ended: what is neither pending nor running."""
        counts = self._connection.execute(f"SELECT pending + running FROM {SCHEMA}.queues").fetchall()
        return self.plan.files - sum(count for (count,) in counts) if counts else 0

    def _interfere(self) -> None:
        """In the second half: kill a worker, then see what becomes of its work."""
        if self.plan.kill and self._victim is None:
            self._kill_one()
        if not self._pending_shown:
            self._show_pending()
        if self._in_flight and not self._settled:
            self._look_for_take_over()

    def _kill_one(self) -> None:
        """Kill the first worker that has something in flight; if none has, somebody will in a moment."""
        for worker in self._workers:
            row = self._connection.execute(
                f"SELECT id FROM {SCHEMA}.workers WHERE pid = %s AND status = 'live' AND running > 0", [worker.pid]
            ).fetchone()
            if row is None:
                continue
            worker.kill()
            self._killed_at = time.monotonic()
            self._victim, self._victim_id = worker, row[0]
            self._in_flight = self._held()
            self.screen.say(f"{worker} killed with SIGKILL, {len(self._in_flight)} workflows in flight.", style="red")
            return

    def _held(self) -> list[UUID]:
        """What the database says that the victim holds."""
        rows = self._connection.execute(
            f"SELECT id FROM {SCHEMA}.workflows WHERE status = 'running' AND worker_id = %s", [self._victim_id]
        ).fetchall()
        return [id for (id,) in rows]

    def _look_for_take_over(self) -> None:
        """Whether everything that the victim had has gone on elsewhere. (A flush that was on its way may have ended
        one or the other after all: that is neither waiting nor taken over.)"""
        ((waiting, taken_over),) = self._connection.execute(
            f"""
            SELECT count(*) FILTER (WHERE status = 'pending' OR status = 'running' AND worker_id = %s),
                   count(*) FILTER (WHERE status <> 'pending' AND recoveries > 0)
            FROM {SCHEMA}.workflows
            WHERE id = ANY (%s)
            """,
            [self._victim_id, self._in_flight],
        ).fetchall()
        if waiting:
            return
        self._settled, self._taken_over = True, taken_over
        seconds = time.monotonic() - self._killed_at
        others = ", ".join(str(worker) for worker in self._workers if worker is not self._victim)
        self.screen.say(f"{taken_over} workflows taken over after {seconds:.1f} s, by {others}.", style="green")
        self.screen.say(f"Started {self._start_worker()} in the place of the killed one.")

    def _show_pending(self) -> None:
        self._pending_shown = True
        self.screen.say("What is still to be done, in SQL:")
        self.screen.query(self._connection, PENDING, columns=("id", "name", "status", "input"), most=4, path=True)

    # --- the end ---------------------------------------------------------------------------------------------------

    def _prove(self) -> bool:
        outcome = proof.gather(
            self._connection,
            files=self.plan.files,
            bodies=[line for worker in self._workers for line in worker.bodies()],
            in_flight=self._in_flight if self.plan.kill else None,
            taken_over=self._taken_over,
        )
        self._tell(outcome)
        problems = outcome.problems()
        for problem in problems:
            self.screen.say(f"FAILED: {problem}.", style="bold red")
        if not problems:
            self.screen.say("Proven: nothing was lost, and nothing was done twice.", style="bold green")
        return not problems

    def _tell(self, outcome: proof.Outcome) -> None:
        say, query = self.screen.say, self.screen.query
        say("\nSteps that failed (some files of the library are no valid source; their workflows got on with it):")
        query(self._connection, FAILED_STEPS, columns=("workflow_id", "name", "error"), most=4, path=True)
        say("\nThe proof. The table of results has no constraint that would keep a second row out.")
        for text in (proof.ROWS, proof.STATUSES, proof.ATTEMPTS):
            query(self._connection, text)
        say(f"\n{outcome.checkpoints:,} steps are recorded; {_ran_again(outcome)}.")
        say(
            f"{outcome.files:,} workflows in {self._seconds:.1f} s, from the start of the workers: "
            f"{outcome.files / self._seconds:,.0f} workflows/s, {outcome.checkpoints / self._seconds:,.0f} steps/s."
        )


def _ran_again(outcome: proof.Outcome) -> str:
    if not outcome.again:
        return "none of them ran again"
    if outcome.elsewhere:
        return f"{outcome.again:,} of them ran again, {outcome.elsewhere:,} of which no kill explains"
    return f"{outcome.again:,} of them ran again: they hadn't been recorded yet when their worker was killed"
