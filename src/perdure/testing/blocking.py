"""The kit for blocking code: the same without `await`; its worker runs on the loop of the blocking verbs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self

from typing_extensions import TypeVar

from perdure.app import App
from perdure.authoring.steps import Step
from perdure.authoring.workflows import Invocation
from perdure.blocking import PORTAL, BlockingHandle
from perdure.model.replay import Replayed
from perdure.model.unset import UNSET
from perdure.testing.clock import PATIENCE, Clock
from perdure.testing.crashes import CrashReport, Drive, Same
from perdure.testing.fakes import Fake
from perdure.testing.kit import Kit

R = TypeVar("R")


class BlockingClock:
    """The database's time, in a test without an event loop."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def now(self) -> datetime:
        return PORTAL.run(self._clock.now(), "clock.now()")

    def advance(self, delay: timedelta, *, settle: bool = True, timeout: timedelta = PATIENCE) -> None:
        PORTAL.run(self._clock.advance(delay, settle=settle, timeout=timeout), "clock.advance()")


class BlockingKit:
    """What a test has: `with perdure_app(app) as kit: ...`, with the verbs of `app.blocking` in the block.

    Attributes:
        app: The app.
        clock: The database's clock, which stands still until `clock.advance(...)`.
        kit: The same kit with `await`, for what runs on the loop of the blocking verbs: `drive=` of `crash_everywhere`.
    """

    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        self.app: App = kit.app
        self.clock: BlockingClock

    @property
    def database_url(self) -> str:
        """The server; `using=` of transactional steps must lead there, too."""
        return self.kit.database_url

    @property
    def schema(self) -> str:
        """The schema of the test."""
        return self.kit.schema

    def __enter__(self) -> Self:
        PORTAL.run(self.kit.__aenter__(), "perdure_app()")
        self.clock = BlockingClock(self.kit.clock)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        PORTAL.run(self.kit.__aexit__(kind, error, trace), "perdure_app()")

    def idle(self, *, timeout: timedelta = PATIENCE) -> None:
        PORTAL.run(self.kit.idle(timeout=timeout), "kit.idle()")

    def finish(self, handle: BlockingHandle[R], *, timeout: timedelta = PATIENCE) -> R:
        return PORTAL.run(self.kit.finish(handle.handle, timeout=timeout), "kit.finish()")

    def run(self, invocation: Invocation[R], /, **options: Any) -> R:
        return PORTAL.run(self.kit.run(invocation, **options), "kit.run()")

    def crash(self) -> None:
        PORTAL.run(self._crash(), "kit.crash()")

    async def _crash(self) -> None:
        self.kit.crash()

    def start_worker(self) -> None:
        PORTAL.run(self.kit.start_worker(), "kit.start_worker()")

    def stop_worker(self) -> None:
        PORTAL.run(self.kit.stop_worker(), "kit.stop_worker()")

    def fake(
        self,
        step: Step[..., Any],
        *,
        returns: Any = UNSET,
        raises: BaseException | type[BaseException] | None = None,
        calls: Callable[..., Any] | None = None,
    ) -> Fake:
        return self.kit.fake(step, returns=returns, raises=raises, calls=calls)

    def replay(self, workflow: BlockingHandle[Any] | Mapping[str, Any]) -> Replayed:
        handle = workflow.handle if isinstance(workflow, BlockingHandle) else workflow
        return PORTAL.run(self.kit.replay(handle), "kit.replay()")

    def crash_everywhere(
        self,
        invocation: Invocation[Any],
        /,
        *,
        drive: Drive | None = None,
        same: Same = operator.eq,
        kill: bool = False,
        most: int = 500,
    ) -> CrashReport:
        crashing = self.kit.crash_everywhere(invocation, drive=drive, same=same, kill=kill, most=most)
        return PORTAL.run(crashing, "kit.crash_everywhere()")
