"""A worker as a process: `python worker.py '{"url": ..., "schema": ..., ...}'`. Its events go to stdout, a line each.

SIGTERM stops it in order, as a service manager would.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from flows import build  # type: ignore[import-not-found]

from perdure import telemetry


def tell(event: telemetry.Event) -> None:
    """From the main thread and from the lease's; a line must stay one."""
    line = json.dumps(telemetry.as_dict(event), default=str)
    os.write(sys.stdout.fileno(), line.encode() + b"\n")


def ask_to_stop(stop: asyncio.Event) -> None:
    os.write(sys.stdout.fileno(), b'{"event": "Stopping"}\n')
    stop.set()


async def main(options: dict[str, Any]) -> None:
    app = build(
        options["url"],
        options["schema"],
        Path(options["notes"]),
        max_recoveries=options["max_recoveries"],
        statement_timeout=options["statement_timeout"],
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask_to_stop, stop)
    lease, grace = timedelta(seconds=options["lease"]), timedelta(seconds=options["grace"])
    async with app, app.worker(lease=lease, grace=grace, concurrency=options["concurrency"]):
        await stop.wait()


if __name__ == "__main__":
    telemetry.subscribe(tell)
    asyncio.run(main(json.loads(sys.argv[1])))
