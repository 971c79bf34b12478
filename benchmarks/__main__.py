"""`python -m benchmarks`: set up a server, measure, print, and keep what was measured."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench, server, sync_milliseconds
from benchmarks.figures import Curve, Figure, table
from benchmarks.plots import draw
from perdure import __version__

MEASUREMENTS = (
    "drain",
    "starting",
    "pickup",
    "latency",
    "sequence",
    "idle",
    "crowd",
    "beginning",
    "payloads",
    "scaling",
    "distance",
    "ageing",
    "ordering",
    "replaying",
    "recovery",
    "sleeping",
    "messages",
    "asking",
    "children",
    "streaming",
)
REQUIRED = ("matplotlib", "uvloop", "dbos", "absurd_sdk", "absurdctl", "pgqueuer", "asyncpg", "procrastinate")
"""What draws, what workers run on, and the peers that `drain` runs, with what they need."""
RESULTS = Path(__file__).parent / "results"
LATEST = RESULTS / "latest.json"


def main() -> int:
    """Returns the exit code: 0, all targets reached; 1, not all; 2, it couldn't run."""
    options = _options()
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"benchmarks: {', '.join(missing)} isn't installed; `make bench` does that, or pip install '.[bench]'",
            file=sys.stderr,
        )
        return 2
    if not sys.platform.startswith("linux"):
        print("benchmarks: processes are measured by /proc, which only Linux has", file=sys.stderr)
        return 2
    figures: dict[str, list[Figure]] = {}
    curves: dict[str, list[Curve]] = {}
    with server() as cluster:
        bench = Bench(cluster=cluster, repeats=options.repeats, quick=options.quick, seconds=options.seconds)
        for name in options.only:
            measurement = importlib.import_module(f"benchmarks.{name}")
            found: list[Figure | Curve] = measurement.measure(bench)
            figures[name] = [each for each in found if isinstance(each, Figure)]
            curves[name] = [each for each in found if isinstance(each, Curve)]
            print(f"\n{table(f'{name}: {_first_line(measurement)}', figures[name])}", flush=True)
        version, sync = cluster.status().version, sync_milliseconds(cluster.directory)
    _keep(figures, curves, options, version, sync)
    failed = [figure for all in figures.values() for figure in all if figure.passed is False]
    print(f"\n{'FAIL' if failed else 'PASS'}: {len(failed)} targets missed; {LATEST}")
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=sys.modules["benchmarks"].__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", action="append", choices=MEASUREMENTS, help="measure this; may be given again")
    parser.add_argument("--repeats", type=int, default=3, help="how often everything is measured (default: 3)")
    parser.add_argument("--quick", action="store_true", help="small counts: does it run? No figures to quote")
    parser.add_argument("--seconds", type=float, help="how long what ages is watched, each (default: 60; quick: 9)")
    options = parser.parse_args()
    if options.seconds is None:
        options.seconds = 9.0 if options.quick else 60.0
    if options.repeats < 1:
        parser.error("--repeats must be 1 or more")
    options.only = options.only or list(MEASUREMENTS)
    return options


def _first_line(measurement: Any) -> str:
    return str(measurement.__doc__).partition("\n")[0]


def _keep(
    figures: dict[str, list[Figure]],
    curves: dict[str, list[Curve]],
    options: argparse.Namespace,
    version: str | None,
    sync: float,
) -> None:
    """As JSON, and drawn."""
    RESULTS.mkdir(exist_ok=True)
    kept = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "perdure": __version__,
        "python": platform.python_version(),
        "postgresql": version,
        "quick": options.quick,
        "repeats": options.repeats,
        "seconds": options.seconds,
        "processors": os.cpu_count(),
        "fdatasync_ms": round(sync, 3),
        "figures": {name: [figure.as_dict() for figure in all] for name, all in figures.items()},
        "curves": {name: [curve.as_dict() for curve in all] for name, all in curves.items() if all},
    }
    LATEST.write_text(json.dumps(kept, indent=2) + "\n")
    for name, all in curves.items():
        if all:
            draw(name, all, RESULTS / f"{name}.svg")


if __name__ == "__main__":
    sys.exit(main())
