"""A worker of the demo: `python -m perdure.demo.worker_process JOURNAL`; ends with SIGTERM, or with its parent.

The journal is a file to which it appends a line for every step's body that begins. Lines go straight to the kernel, so
they survive a SIGKILL: compared with the checkpoints, they tell how many bodies ran again.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import warnings
from datetime import timedelta

from perdure import telemetry
from perdure.demo.program import app, close

CONCURRENCY = 32
LEASE = timedelta(seconds=2)


async def work() -> None:
    """Run workflows until told to stop, or until the parent is gone: then the pipe that is our stdin ends."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def parent_is_gone() -> None:
        loop.remove_reader(0)
        stop.set()

    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_reader(0, parent_is_gone)
    async with app:
        async with app.worker(concurrency=CONCURRENCY, lease=LEASE, grace=timedelta(seconds=5)):
            await stop.wait()
        await close()


def main(journal: str) -> None:
    """Keep the journal, and work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, who ends us in order
    warnings.simplefilter("ignore")  # about the source files: their authors' business
    file = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(event: telemetry.Event) -> None:
        if isinstance(event, telemetry.StepStarted):
            os.write(file, f"{event.workflow_id} {event.key}\n".encode())

    telemetry.subscribe(note)
    asyncio.run(work())


if __name__ == "__main__":
    main(sys.argv[1])
