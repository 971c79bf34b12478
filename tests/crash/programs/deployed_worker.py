"""A worker of one version, as a process: `python deployed_worker.py '{"version": "1", ...}'`. See worker.py."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from crash.programs import deploys
from crash.programs.worker import ask_to_stop, tell
from perdure import telemetry


async def main(options: dict[str, Any]) -> None:
    app = deploys.build(options["url"], options["schema"], Path(options["notes"]), options["version"])
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ask_to_stop, stop)
    async with app, app.worker(lease=timedelta(seconds=options["lease"]), grace=timedelta(seconds=5), concurrency=20):
        await stop.wait()


if __name__ == "__main__":
    telemetry.subscribe(tell)
    asyncio.run(main(json.loads(sys.argv[1])))
