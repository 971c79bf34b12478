"""perdure.testing: workflows under test, on a real PostgreSQL, with a clock that the test puts forward.

    async def test_checkout(perdure_app):                      # a fixture of perdure's pytest plugin
        async with perdure_app(app) as kit:
            kit.fake(charge, returns="payment-1")
            handle = await app.start(checkout(42))
            await kit.clock.advance(timedelta(days=1))
            assert await handle.result() == "payment-1"

Without pytest: `from perdure.testing import perdure_app`. For blocking code: `with perdure_app(app) as kit`.
"""

from perdure.testing.bed import TestBed, perdure_app
from perdure.testing.blocking import BlockingClock, BlockingKit
from perdure.testing.clock import Clock
from perdure.testing.crashes import CrashFailure, CrashReport
from perdure.testing.fakes import Called, Fake, fake
from perdure.testing.kit import Kit

__all__ = [
    "BlockingClock",
    "BlockingKit",
    "Called",
    "Clock",
    "CrashFailure",
    "CrashReport",
    "Fake",
    "Kit",
    "TestBed",
    "fake",
    "perdure_app",
]
