"""The primary dies in the middle of the work, and a synchronous standby takes its place: nobody is restarted."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from .pair import Pair, pair
from .storm import Fault, Storm


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
