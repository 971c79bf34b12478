"""Replay without effects: today's code over a recorded history."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from perdure import App, ReplayMismatch, UnknownWorkflow, now, patched, sleep, step
from perdure.model.replay import Verdict
from perdure.testing import TestBed

Bed = Callable[..., TestBed]
DAY = timedelta(days=1)


class Code:
    """Workflows whose code can be edited between two runs."""

    def __init__(self, ran: list[str]) -> None:
        self.app = app = App("replay")
        self.edit = ""
        code = self

        @step
        async def weigh(kilos: int) -> int:
            ran.append("weigh")
            return kilos

        @step(pure=True)
        async def label(kilos: int) -> str:
            ran.append("label")
            return f"{kilos} kg"

        @step
        def insure() -> None:
            ran.append("insure")

        @step
        async def stamp() -> None:
            ran.append("stamp")

        @app.workflow
        async def ship(kilos: int) -> str:
            if code.edit == "new step":
                await stamp()
            if code.edit == "patched" and patched("insurance"):
                await insure()
            weighed = await (label(kilos) if code.edit == "other step" else weigh(kilos + (code.edit == "arguments")))
            if code.edit != "removed step":
                await asyncio.gather(label(kilos), insure())
            now()
            if code.edit == "foreign":
                await asyncio.sleep(0.01)
            if code.edit == "stands still":
                await asyncio.Event().wait()
            await sleep(DAY)
            if code.edit == "raises":
                raise ValueError("new")
            return "changed" if code.edit == "result" else f"shipped {weighed}"

        self.ship = ship


async def test_a_finished_and_an_unfinished_one_match_and_nothing_runs_or_is_written(bed: Bed, ran: list[str]) -> None:
    code = Code(ran)
    async with bed(code.app) as kit:
        done = await code.app.start(code.ship(1))
        await kit.finish(done)
        asleep = await code.app.start(code.ship(2))
        await kit.idle()
        bodies, rows = list(ran), await _rows(code.app)
        assert (await kit.replay(done)).note == "it comes to its end"
        assert (await kit.replay(asleep)).note == "it waits: timer"
        assert (ran, await _rows(code.app)) == (bodies, rows)


@pytest.mark.parametrize(
    ("edit", "recorded", "asked"),
    [
        ("other step", "step 'weigh'", ""),
        ("arguments", "step 'weigh'", "step 'weigh' with other arguments"),
        ("new step", "step 'weigh'", "step 'stamp'"),
        ("removed step", "step 'label'", ""),
        ("result", 'the result "shipped 1"', 'the result "changed"'),
        ("raises", 'the result "shipped 1"', "builtins.ValueError: new"),
        ("foreign", 'the result "shipped 1"', "perdure.errors.ForeignAwait"),
        ("stands still", 'the result "shipped 1"', "error: it doesn't come to rest within 1 s; it waits at "),
    ],
)
async def test_code_that_takes_another_path_is_shown(
    bed: Bed, ran: list[str], monkeypatch: pytest.MonkeyPatch, edit: str, recorded: str, asked: str
) -> None:
    monkeypatch.setattr("perdure.engine.replays._PATIENCE_SECONDS", 1.0)
    code = Code(ran)
    async with bed(code.app) as kit:
        handle = await code.app.start(code.ship(1))
        await kit.finish(handle)
        bodies, rows, code.edit = list(ran), await _rows(code.app), edit
        with pytest.raises(ReplayMismatch) as mismatch:
            await kit.replay(handle)
        assert mismatch.value.recorded == recorded
        assert mismatch.value.asked.startswith(asked)
        assert (ran, await _rows(code.app)) == (bodies, rows)


async def test_a_change_behind_patched_matches_what_is_old(bed: Bed, ran: list[str]) -> None:
    code = Code(ran)
    async with bed(code.app) as kit:
        handle = await code.app.start(code.ship(1))
        await kit.idle()
        code.edit = "patched"
        assert (await kit.replay(handle)).verdict is Verdict.MATCHES
        assert await kit.finish(handle) == "shipped 1"


async def test_an_exported_history_is_a_regression_test(bed: Bed, ran: list[str]) -> None:
    code = Code(ran)
    async with bed(code.app) as kit:
        handle = await code.app.start(code.ship(1))
        await kit.idle()
        unfinished = await code.app.export(handle.id)
        await kit.finish(handle)
        finished = await code.app.export(handle.id)
    async with bed(code.app) as kit:  # another database, for all it knows
        assert (await kit.replay(unfinished)).note == "it waits: timer"
        assert (await kit.replay(finished)).note == "it comes to its end"
        code.edit = "arguments"
        for exported in (unfinished, finished):
            with pytest.raises(ReplayMismatch, match="with other arguments"):
                await kit.replay(exported)
        with pytest.raises(ValueError, match=r"no exported workflow .* give what app\.export\(\) gave"):
            await kit.replay({"workflow": {}})


async def test_a_workflow_that_the_app_does_not_know_is_named(bed: Bed, ran: list[str]) -> None:
    code, other = Code(ran), App("other")

    @other.workflow
    async def unrelated() -> None: ...

    async with bed(code.app) as kit:
        handle = await code.app.start(code.ship(1))
        exported = await code.app.export(handle.id)
        await kit.idle()
    async with bed(other) as kit:
        with pytest.raises(UnknownWorkflow, match="no workflow is named 'ship'"):
            await kit.replay(exported)


async def _rows(app: App) -> list[Any]:
    """Everything that workflows have written."""
    found: list[Any] = []
    async with app.session().database.connection() as connection:
        for table in ("workflow_rows", "checkpoints", "queue_entries", "waits", "deadlines"):
            text = f'SELECT t::text FROM "{app.settings.schema}".{table} AS t ORDER BY 1'
            cursor = await connection.execute(text)
            found += [tuple(row) for row in await cursor.fetchall()]
    return found
