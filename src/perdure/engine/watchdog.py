"""Notices that something blocks the event loop, and says where it stands. Runs on another loop, in another thread."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback

from perdure import telemetry

_LOOK_SECONDS = 0.25
_BLOCKED_SECONDS = 1.0


class Watchdog:
    """Pings a loop; one that doesn't answer for a second is reported, with the stack that blocks it."""

    def __init__(self, watched: asyncio.AbstractEventLoop) -> None:
        self._watched = watched
        self._thread_id = threading.get_ident()
        self._answered = time.monotonic()

    async def run(self) -> None:
        """Watch until cancelled. A blockage is reported when it has lasted a second, and each time that doubles."""
        report_at = _BLOCKED_SECONDS
        while True:
            try:
                self._watched.call_soon_threadsafe(self._answer)
            except RuntimeError:
                return  # the loop is closed
            await asyncio.sleep(_LOOK_SECONDS)
            blocked = time.monotonic() - self._answered
            if blocked < _BLOCKED_SECONDS:
                report_at = _BLOCKED_SECONDS
            elif blocked >= report_at:
                report_at *= 2
                telemetry.emit(telemetry.LoopBlocked(seconds=blocked, stack=self._stack()))

    def _answer(self) -> None:
        self._answered = time.monotonic()

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._thread_id)
        return "".join(traceback.format_stack(frame)).rstrip() if frame else "(the thread has ended)"
