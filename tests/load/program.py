"""A process under load: `python program.py JSON` (role, url, schema and what that role needs); it says JSON lines.

Roles: `worker` runs what is there, `clients` start as much as they can. Both say each half second how much memory they
have needed at most, and end in order at SIGTERM.
"""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from perdure import App, step

MIB = 1024 * 1024
_STEP_SECONDS = 0.02
_EVERY_SECONDS = 0.5


def build(options: dict[str, Any]) -> App:
    """What is run."""
    app = App("load", database_url=options["url"], schema=options["schema"])

    @step
    async def take_time(number: int) -> int:
        await asyncio.sleep(_STEP_SECONDS)
        return number

    @step
    async def turn(text: str) -> str:
        return text[::-1]

    @app.workflow
    async def work(number: int) -> int:
        return await take_time(number)

    @app.workflow
    async def carry(text: str) -> str:
        return await turn(text)

    return app


def say(event: str, **values: Any) -> None:
    """One line."""
    print(json.dumps({"event": event, **values}), flush=True)


def most_mib() -> float:
    """How much memory this process has needed at most."""
    if sys.platform == "linux":  # where `getrusage` counts what the process was forked from
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB


async def work(app: App, options: dict[str, Any], stop: asyncio.Event) -> None:
    """A worker, until it is told to stop."""
    async with app, app.worker(concurrency=options["concurrency"], grace=timedelta(seconds=1)):
        say("begins", mib=most_mib())
        while not stop.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), _EVERY_SECONDS)
            say("sample", mib=most_mib())


async def ask(app: App, options: dict[str, Any], stop: asyncio.Event) -> None:
    """Many clients, each of which starts one workflow after the other; what is acknowledged is noted in a file."""
    took: list[float] = []
    acknowledged = 0
    run = app.workflow_functions["work"]

    with Path(options["notes"]).open("w") as notes:

        async def client() -> None:
            nonlocal acknowledged
            while not stop.is_set():
                began = time.perf_counter()
                handle = await app.start(run(acknowledged))
                took.append(time.perf_counter() - began)
                acknowledged += 1
                notes.write(f"{handle.id}\n")

        async with app:
            clients = [asyncio.ensure_future(client()) for _ in range(options["clients"])]
            while not stop.is_set():
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), _EVERY_SECONDS)
                start_ms = median(took) * 1000 if took else None
                took.clear()
                say("sample", mib=most_mib(), acknowledged=acknowledged, start_ms=start_ms)
            await asyncio.gather(*clients)
    say("ends", acknowledged=acknowledged)


async def main(options: dict[str, Any]) -> None:
    """Play the role."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    app = build(options)
    await {"worker": work, "clients": ask}[options["role"]](app, options, stop)


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
