"""A worker as `perdure worker` makes it: `python -m benchmarks.worker CONCURRENCY`; it ends when its stdin does."""

from __future__ import annotations

import os
import signal
import sys
import threading

from perdure import telemetry
from perdure.cli import cli


def main(concurrency: str) -> None:
    """Run the command, as a user would."""

    def tell(event: telemetry.Event) -> None:
        if isinstance(event, telemetry.WorkerStarted):
            unsubscribe()  # who listens to all events pays for them
            print("works", flush=True)

    unsubscribe = telemetry.subscribe(tell)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    cli(["worker", "benchmarks.program:app", "--concurrency", concurrency, "--grace", "5", "--log-level", "warning"])


def _end_with_stdin() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main(sys.argv[1])
