"""The job is started once, polled without growing the history, and given up in time."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from perdure import DeadlineExceeded, WorkflowFailed
from transcoding import SERVICE, app, transcode


@pytest.fixture(autouse=True)
def _service() -> None:
    SERVICE.jobs.clear()
    SERVICE.looks.clear()
    SERVICE.looks_needed = 2


async def test_it_is_polled_until_it_is_done_and_the_history_stays_short(perdure_app: Any) -> None:
    SERVICE.looks_needed = 20
    async with perdure_app(app) as kit:
        handle = await app.start(transcode("cats.mov"))
        assert (await kit.finish(handle)).startswith("https://cdn.example.org/")
        assert [each.name for each in await handle.steps()] == ["start_job", "wait_for_job"]
    assert list(SERVICE.looks.values()) == [20]


async def test_what_the_service_refuses_fails(perdure_app: Any) -> None:
    async with perdure_app(app) as kit:
        with pytest.raises((WorkflowFailed, Exception), match="TranscodingFailed"):
            await kit.run(transcode("notes.txt"))


async def test_it_is_given_up_after_a_day(perdure_app: Any) -> None:
    SERVICE.looks_needed = 1000
    async with perdure_app(app) as kit:
        handle = await app.start(transcode("cats.mov"))
        await kit.clock.advance(timedelta(days=1))
        with pytest.raises(DeadlineExceeded):
            await kit.finish(handle)


async def test_the_service_gets_one_job_wherever_it_crashes(perdure_app: Any) -> None:
    async with perdure_app(app) as kit:
        report = await kit.crash_everywhere(transcode("cats.mov"), same=lambda one, other: True)
        assert "after step 'start_job' (attempt 1)" in report.boundaries
        runs = len([each async for each in app.workflows()])
    assert len(SERVICE.jobs) == runs, "one for each run of the workflow"
