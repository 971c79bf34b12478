"""`perdure_app`: where a test begins, for `async with` and for `with`."""

from __future__ import annotations

from datetime import timedelta
from types import TracebackType

from perdure.app import App
from perdure.testing.blocking import BlockingKit
from perdure.testing.kit import Kit


class TestBed:
    """A block with a kit: `async with` gives a `Kit`, `with` a `BlockingKit`."""

    __test__ = False  # no class of tests, whatever pytest makes of its name

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self._blocking = BlockingKit(kit)

    async def __aenter__(self) -> Kit:
        return await self._kit.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._kit.__aexit__(kind, error, trace)

    def __enter__(self) -> BlockingKit:
        return self._blocking.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._blocking.__exit__(kind, error, trace)


def perdure_app(
    app: App,
    /,
    *,
    database_url: str | None = None,
    concurrency: int = 100,
    lease: timedelta = timedelta(seconds=10),
) -> TestBed:
    """An app under test: in the block its verbs work on a schema of the test's own, and a worker runs what they start.

    The worker is in this process, strict (`App(strict=True)`), and lives as long as the block. The database's clock
    stands still until the test puts it forward. What is left in the end is gone with the schema.

    Args:
        app: The app, as it is: neither its URL nor its schema matters here.
        database_url: The server; by default `PERDURE_TEST_DATABASE_URL`, else the project's embedded PostgreSQL. The
            role must be allowed to make schemas.
        concurrency: How many workflows run at the same time, at most.
        lease: How long a worker may go unheard, by the test's clock.
    """
    return TestBed(Kit(app, database_url=database_url, schema=None, concurrency=concurrency, lease=lease))
