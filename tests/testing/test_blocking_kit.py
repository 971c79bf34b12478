"""The kit without `await`."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from perdure import Handle, Status, WrongPlace
from perdure.testing import BlockingKit, Kit, TestBed

from . import flows

Bed = Callable[..., TestBed]
DAY = timedelta(days=1)


def test_blocking_code_has_the_same_kit(bed: Bed) -> None:
    seen: list[Status] = []
    with bed(flows.app) as kit:
        charging = kit.fake(flows.charge, returns="faked")
        began = kit.clock.now()
        handle = flows.app.blocking.start(flows.checkout(1), key="order-1")
        kit.idle()
        assert handle.status() is Status.WAITING
        kit.crash()
        kit.clock.advance(DAY)
        assert (handle.result(), kit.clock.now() - began) == ("faked", DAY)
        assert kit.replay(handle).note == "it comes to its end"
        assert kit.run(flows.checkout(2)) == "faked"
        assert len(charging.calls) == 2
        assert kit.crash_everywhere(flows.checkout(3)).reran == ("charge",)

        async def look(handle: Handle[str]) -> None:
            await kit.kit.idle()
            seen.append(await handle.status())

        assert kit.crash_everywhere(flows.checkout(3), drive=look).reran == ("charge",)
        assert Status.WAITING in seen
        kit.stop_worker()
        waiting = flows.app.blocking.start(flows.checkout(4))
        assert waiting.status() is Status.PENDING
        kit.start_worker()
        assert kit.finish(waiting) == "faked"


async def test_it_is_refused_where_a_loop_runs(bed: Bed) -> None:
    with pytest.raises(WrongPlace, match=r"blocking perdure_app\(\) was called in a running event loop"):
        bed(flows.app).__enter__()


def test_both_kits_have_the_same_verbs() -> None:
    def verbs(kind: type[Any]) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert verbs(Kit) - {"worker", "lease"} == verbs(BlockingKit) - {"database_url", "schema"}
