"""Whatever a workflow's code is made of, and wherever its runs end: a replay sees what was seen before."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from acceptance.support import SOON
from perdure import App, current, telemetry
from perdure.worker import Worker, WorkerOptions

from .program import (
    LIVES,
    Call,
    End,
    Library,
    Life,
    Sequence,
    Sleep,
    Spawn,
    Story,
    Timeout,
    Together,
    Value,
    programs,
)

QUICK = settings(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
LONG = settings(QUICK, max_examples=1000, derandomize=False)

ENDS = st.lists(st.builds(End, after=st.integers(1, 40), in_order=st.booleans()), min_size=1, max_size=3).map(tuple)
SEEDS = st.integers(0, 1000)
RACES = programs(races=True)
CALM = programs(races=False)
EDITED = programs(races=False, edits=True)
ONE_END = st.builds(End, after=st.integers(1, 30), in_order=st.booleans())

TWO_SLEEPERS = Sequence(
    (
        Spawn(Together("race", (Sleep(0), Value("now"))), None),
        Spawn(Together("race", (Sleep(0), Timeout(1, Library((0, 0, 0))))), None),
    )
)
"""Both are cancelled as they wake: on a replay the first one still waits for the history to be served."""

Row = tuple[Any, ...]


class Stage:
    """Where stories are played: one app, one worker."""

    def __init__(self, app: App, sql: Callable[..., list[Any]]) -> None:
        self._app = app
        self._sql = sql
        self._stories: list[Story] = []
        self._worker: Worker
        self._ended: dict[UUID, asyncio.Future[None]] = {}
        self.unasked: list[telemetry.StepsUnasked] = []

        @app.workflow
        async def play(number: int) -> list[str]:
            return await self._begin(self._stories[number]).run()

        self._play = play

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        unsubscribe = telemetry.subscribe(self._hear)
        options = WorkerOptions(suspends_from=timedelta(milliseconds=3), grace=timedelta(0))
        async with self._app._worker(options) as self._worker:
            yield
        unsubscribe()

    def _hear(self, event: telemetry.Event) -> None:
        match event:
            case telemetry.StepsUnasked():
                self.unasked.append(event)
            case telemetry.WorkflowEnded(workflow_id=id) if id in self._ended:
                self._ended.pop(id).set_result(None)
            case telemetry.WorkflowSuspended():
                self._worker.timer_set()  # it waits for a moment only: don't let it oversleep

    def _begin(self, story: Story) -> Life:
        run = self._worker._executor.runs[current().id]

        def cut_short(in_order: bool) -> None:
            if self._worker._executor.runs.get(run.id) is run and not run.over:
                if in_order:
                    self._worker._executor.run_handed_over(run)
                else:
                    self._worker._executor.run_lost(run, "the test wants it")

        life = LIVES[run.id] = Life(story, run.epoch, cut_short)
        story.lives.append(life)
        return life

    async def play(self, story: Story) -> UUID:
        """Start it; returns when it has ended."""
        self._stories.append(story)
        handle = await self._app.start(self._play(len(self._stories) - 1))
        await handle.result(timeout=SOON)
        return handle.id

    async def again(self, id: UUID) -> None:
        """Let it run from its beginning to its end, with all that was recorded but its result."""
        ended = self._ended[id] = asyncio.get_running_loop().create_future()
        self._sql(
            """
            WITH ended AS (
                DELETE FROM checkpoints WHERE workflow_id = %s AND key = '$result' RETURNING workflow_id, epoch
            )
            INSERT INTO queue_entries (shard, workflow_id, queue, name, enqueued_at, epoch)
            SELECT 1, id, queue, name, now(), epoch FROM ended JOIN workflow_rows ON id = workflow_id
            """,
            id,
        )
        self._worker.hint("default")
        async with asyncio.timeout(SOON.total_seconds()):
            await ended

    def recorded(self, id: UUID) -> dict[str, Row]:
        """What was recorded, by key; the result, without what tells runs apart."""
        rows = self._sql(
            "SELECT key, kind, position, status, payload::text, args_hash, attempts, "
            "CASE WHEN key <> '$result' THEN epoch END FROM checkpoints WHERE workflow_id = %s ORDER BY key",
            id,
        )
        return {row[0]: row[1:] for row in rows}


@pytest.fixture(params=["tasks"] if sys.version_info < (3, 12) else ["tasks", "eager tasks"])
async def stage(request: pytest.FixtureRequest, app: App, sql: Callable[..., list[Any]]) -> AsyncIterator[Stage]:
    if sys.version_info >= (3, 12) and request.param == "eager tasks":
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
    stage = Stage(app, sql)
    async with stage.open():
        yield stage
    LIVES.clear()


async def _check_replay(stage: Stage, story: Story, id: UUID) -> None:
    """A replay of all that was recorded runs no body of it, and records and returns the same.

    But for attempts at steps without an outcome, of tasks that nobody waits for: the workflow's end cuts them short.
    """
    before = stage.recorded(id)
    stage.unasked.clear()
    story.ends = ()
    lives = len(story.lives)
    log = story.lives[-1].log
    await stage.again(id)
    (life,) = story.lives[lives:]
    assert life.log == log
    assert not before.keys() & set(life.bodies), "what has no outcome may begin again; what has one may not"
    assert _lasting(stage.recorded(id)) == _lasting(before)
    assert stage.unasked == []


def _lasting(recorded: dict[str, Row]) -> dict[str, Row]:
    return {key: row for key, row in recorded.items() if row[0] != "attempt" or key.rpartition("#a")[0] in recorded}


def _repeated(story: Story, recorded: dict[str, Row]) -> Iterator[str]:
    """Calls whose body began again after their outcome was recorded."""
    last = {key: row[6] for key, row in recorded.items() if row[0] == "step"}
    for life in story.lives:
        yield from (key for key in life.bodies if life.epoch > last.get(key, life.epoch))


def _check_effects(story: Story) -> None:
    """Whatever began in the world was based on what the last run has seen, too."""
    log = tuple(story.lives[-1].log)
    for life in story.lives:
        for where, seen in life.effects:
            assert log[: len(seen)] == seen, f"in life {life.number}, {where} began after something else"


async def _uninterrupted(stage: Stage, program: Sequence, seed: int) -> None:
    story = Story(program, seed=seed)
    id = await stage.play(story)
    _check_effects(story)
    await _check_replay(stage, story, id)


async def _interrupted(stage: Stage, program: Sequence, ends: tuple[End, ...], seed: int) -> None:
    story = Story(program, ends, seed)
    id = await stage.play(story)
    assert list(_repeated(story, stage.recorded(id))) == []
    _check_effects(story)
    await _check_replay(stage, story, id)


async def _same_keys(stage: Stage, program: Sequence, ends: tuple[End, ...], seed: int) -> None:
    stories = Story(program, seed=seed), Story(program, ends, seed + 1)
    one, other = [stage.recorded(await stage.play(story)) for story in stories]
    assert _identities(one) == _identities(other)


def _identities(recorded: dict[str, Row]) -> dict[str, Row]:
    """What is the same wherever a run ends: keys, kinds, outcomes, arguments; not the order."""
    steps = {key: row for key, row in recorded.items() if row[0] in ("step", "sleep", "value")}
    return {
        key: (kind, status, payload if kind == "step" and status == "success" else None, args_hash)
        for key, (kind, _, status, payload, args_hash, _, _) in steps.items()
    }


async def _edited(stage: Stage, program: Sequence, end: End, seed: int) -> None:
    story = Story(program, (end,), seed)
    id = await stage.play(story)
    if len(story.lives) == 1:
        await stage.again(id)
    assert list(_repeated(story, stage.recorded(id))) == []
    await _check_replay(stage, story, id)


@QUICK
@given(RACES, SEEDS)
@example(Sequence((Spawn(Call(), None), Together("race", (Value("now"),)))), 0)  # it gathers what has ended
@example(TWO_SLEEPERS, 0)
async def test_a_replay_sees_and_records_what_the_first_run_did(stage: Stage, program: Sequence, seed: int) -> None:
    await _uninterrupted(stage, program, seed)


@QUICK
@given(RACES, ENDS, SEEDS)
async def test_wherever_runs_end_nothing_recorded_is_repeated_and_the_order_holds(
    stage: Stage, program: Sequence, ends: tuple[End, ...], seed: int
) -> None:
    await _interrupted(stage, program, ends, seed)


@QUICK
@given(CALM, ENDS, SEEDS)
async def test_wherever_runs_end_the_keys_are_the_same(
    stage: Stage, program: Sequence, ends: tuple[End, ...], seed: int
) -> None:
    await _same_keys(stage, program, ends, seed)


@QUICK
@given(EDITED, ONE_END, SEEDS)
async def test_steps_that_are_new_in_the_code_disturb_no_others(
    stage: Stage, program: Sequence, end: End, seed: int
) -> None:
    await _edited(stage, program, end, seed)


# --- the same, for longer --------------------------------------------------------------------------------------------


class TestMany:
    pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]  # noqa: RUF012

    @LONG
    @given(RACES, SEEDS)
    async def test_replays_see_and_record_what_first_runs_did(self, stage: Stage, program: Sequence, seed: int) -> None:
        await _uninterrupted(stage, program, seed)

    @LONG
    @given(RACES, ENDS, SEEDS)
    async def test_nothing_recorded_is_repeated(
        self, stage: Stage, program: Sequence, ends: tuple[End, ...], seed: int
    ) -> None:
        await _interrupted(stage, program, ends, seed)

    @LONG
    @given(CALM, ENDS, SEEDS)
    async def test_keys_are_the_same(self, stage: Stage, program: Sequence, ends: tuple[End, ...], seed: int) -> None:
        await _same_keys(stage, program, ends, seed)

    @LONG
    @given(EDITED, ONE_END, SEEDS)
    async def test_new_steps_disturb_no_others(self, stage: Stage, program: Sequence, end: End, seed: int) -> None:
        await _edited(stage, program, end, seed)
