"""The primary dies in the middle of the work, and a synchronous standby takes its place: nobody is restarted."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from perdure import App, embedded, step, telemetry
from perdure.embedded import Cluster
from perdure.errors import DatabaseUnavailable

from .pair import pair
from .patroni import patroni
from .storm import Fault, Storm

SOON = timedelta(seconds=30)


class Failover(Storm):
    """A storm of one fault: the primary dies, and somebody makes the standby the primary."""

    def __init__(self, primary: Any, url: str, promote: Callable[[], None], *, seconds: float, folder: Path) -> None:
        super().__init__(primary, seconds=seconds, seed=1, folder=folder, workers=2)
        self._primary = primary
        self._url = url
        self._promote = promote

    @property
    def url(self) -> str:
        return self._url

    @property
    def direct(self) -> str:
        return self._url

    async def _attack(self) -> None:
        if not self.report.faults and self._now > 3 and self._ended > 0:  # in the middle of the work
            await asyncio.to_thread(self._primary.kill)
            self.report.faults.append(Fault(round(self._now, 2), "failover"))
            await asyncio.to_thread(self._promote)

    async def run_to_the_books(self, record_property: pytest.RecordProperty) -> None:
        report = await self.run()
        assert report.wrong == []
        (fault,) = report.faults
        assert fault.recovered is not None
        record_property("seconds from the death of the primary to the next workflow's end", fault.recovered)
        before = max(ended for at, ended in report.samples if at <= fault.at)
        assert report.acknowledged > before > 0
        assert [worker.starts for worker in self.workers] == [1, 1]


@pytest.mark.timeout(300)
async def test_work_goes_on_after_a_failover_and_nothing_acknowledged_is_lost(
    tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    with pair() as both:
        storm = Failover(both.primary, both.url, both.promote, seconds=15, folder=tmp_path)
        await storm.run_to_the_books(record_property)


@pytest.mark.full
@pytest.mark.timeout(600)
async def test_work_goes_on_after_patroni_has_made_the_standby_the_primary(
    tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    """Which takes as long as Patroni's leader may be silent, 20 s, and no worker is told."""
    with patroni() as both:
        primary = await asyncio.to_thread(both.wait)
        storm = Failover(primary, both.url, lambda: None, seconds=45, folder=tmp_path)
        await storm.run_to_the_books(record_property)


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


def set_read_only(cluster: Cluster, value: str) -> None:
    """All sessions are told, also those that are open: as on a primary that was demoted and lives on."""
    with psycopg.connect(cluster.url, autocommit=True, options="-c default_transaction_read_only=off") as connection:
        connection.execute(f"ALTER SYSTEM SET default_transaction_read_only = {value}")
        connection.execute("SELECT pg_reload_conf()")


@pytest.mark.timeout(120)
async def test_a_primary_that_takes_no_writes_any_more_loses_nothing() -> None:
    """The error that this makes is of another family than all others of a server that has gone."""
    reached, let_go = asyncio.Event(), asyncio.Event()
    told: asyncio.Queue[telemetry.Event] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    @step
    async def hold() -> str:
        reached.set()
        await let_go.wait()
        return "held"

    def on_event(event: telemetry.Event) -> None:
        if isinstance(event, telemetry.DatabaseLost | telemetry.LeaseLost):
            loop.call_soon_threadsafe(told.put_nowait, event)

    with embedded.temporary() as cluster:
        app = App("tests", database_url=cluster.url, connect_timeout=timedelta(seconds=1))

        @app.workflow
        async def flow() -> str:
            return await hold()

        unsubscribe = telemetry.subscribe(on_event)
        try:
            async with app, app.worker(lease=timedelta(seconds=2)):
                handle = await app.start(flow())
                await reached.wait()
                await asyncio.to_thread(set_read_only, cluster, "on")
                let_go.set()
                assert "read-only" in (await told.get()).reason  # type: ignore[attr-defined]
                with pytest.raises(DatabaseUnavailable, match="read-only") as caught:
                    await app.start(flow())
                assert not caught.value.outcome_unknown
                while not isinstance(await told.get(), telemetry.LeaseLost):
                    pass
                await asyncio.to_thread(set_read_only, cluster, "off")
                assert await handle.result(timeout=SOON) == "held"
                assert await app.run(flow()) == "held"
        finally:
            unsubscribe()
