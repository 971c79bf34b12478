"""The primary dies in the middle of the work, and a synchronous standby takes its place: nobody is restarted."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from perdure import App, embedded
from perdure.errors import DatabaseUnavailable

from .pair import Pair, pair
from .storm import Fault, Storm

SOON = timedelta(seconds=30)


class Failover(Storm):
    """A storm of one fault."""

    def __init__(self, both: Pair, folder: Path) -> None:
        super().__init__(both.primary, seconds=15, seed=1, folder=folder, workers=2)
        self._both = both

    @property
    def url(self) -> str:
        return self._both.url

    @property
    def direct(self) -> str:
        return self._both.url

    async def _attack(self) -> None:
        if not self.report.faults and self._now > 3:
            await asyncio.to_thread(self._both.primary.kill)
            self.report.faults.append(Fault(round(self._now, 2), "failover"))
            await asyncio.to_thread(self._both.promote)


@pytest.mark.timeout(300)
async def test_work_goes_on_after_a_failover_and_nothing_acknowledged_is_lost(
    tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    with pair() as both:
        storm = Failover(both, tmp_path)
        report = await storm.run()
    assert report.wrong == []
    (fault,) = report.faults
    assert fault.recovered is not None
    record_property("seconds from the death of the primary to the next workflow's end", fault.recovered)
    before = max(ended for at, ended in report.samples if at <= fault.at)
    assert report.acknowledged > before > 0, "it was in the middle of the work"
    assert [worker.starts for worker in storm.workers] == [1, 1]


@pytest.mark.timeout(120)
async def test_a_commit_that_waits_for_its_standby_is_given_up_and_found_again() -> None:
    """COMMIT waits for ever, and no timeout of the server bounds it; cancelling it would be answered with success."""
    with pair() as both:
        app = App("tests", database_url=both.url, connect_timeout=timedelta(seconds=1))

        @app.workflow
        async def flow() -> str:
            return "done"

        app.move(replace(app.settings, statement_timeout=timedelta(seconds=1)))
        async with app:
            first = await app.start(flow(), key="first")
            await asyncio.to_thread(both.standby.kill)
            with pytest.raises(DatabaseUnavailable) as caught:
                await app.start(flow(), key="second")
            assert caught.value.outcome_unknown
            await asyncio.to_thread(both.standby.start, keep=False)
            second = await app.start(flow(), key="second")
            assert not second.started, "it was committed when the standby had it"
            async with app.worker():
                assert [await handle.result(timeout=SOON) for handle in (first, second)] == ["done", "done"]


@pytest.mark.timeout(120)
async def test_a_first_host_that_says_nothing_is_passed_over() -> None:
    """It accepts connections, and is silent: without a limit of time the driver would wait for it for ever."""
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        embedded.temporary({"listen_addresses": "127.0.0.1"}) as cluster,
    ):
        port = silent.getsockname()[1]
        url = f"postgresql://perdure@127.0.0.1:{port},127.0.0.1:{cluster.port}/perdure"
        async with App("tests", database_url=url) as app:

            @app.workflow
            async def flow() -> str:
                return "done"

            async with app.worker():
                assert await app.run(flow()) == "done"
