"""Play seeds: `python -m simulation --seeds 0-199` (in tests/)."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import time
from collections import Counter
from pathlib import Path

from perdure import embedded
from simulation.play import found, outcomes, own_database, play, prepare
from simulation.points import POINTS
from simulation.rules import RULES


def main() -> int:
    """Play them; returns how many failed."""
    parser = argparse.ArgumentParser(description="Play seeds of the simulation.")
    parser.add_argument("--seeds", default="0-199")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--trace", action="store_true", help="play one seed in this process, and print all of it")
    parser.add_argument("--rules", action="store_true", help="switch each rule off, until a seed fails")
    parser.add_argument("--only", type=int, action="append", help="the number of a rule (with --rules or --trace)")
    parser.add_argument("--report", type=Path, help="where to write what happened, as JSON")
    given = parser.parse_args()
    first, _, last = given.seeds.partition("-")
    numbers = list(range(int(first), int(last or first) + 1))
    began = time.perf_counter()
    faults: Counter[str] = Counter()
    points: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    failed = 0
    if given.rules:
        for name, outcome in found(numbers, given.jobs, given.only or range(len(RULES))):
            failed += outcome is None
            print(
                f"{name}: "
                + ("NO SEED FAILS" if outcome is None else f"seed {outcome.number}: {outcome.broken[-300:]}")
            )
            sys.stdout.flush()
        print(f"{time.perf_counter() - began:.1f} s; {failed} rules that no seed needs")
        os._exit(min(failed, 100))
    if given.trace:
        logging.disable()
        with embedded.temporary() as cluster:
            asyncio.run(prepare(cluster.url))
            played = [
                play(
                    number,
                    own_database(cluster.url),
                    trace=True,
                    without=None if given.only is None else RULES[given.only[0]],
                )
                for number in numbers
            ]
    else:
        played = outcomes(numbers, given.jobs)  # type: ignore[assignment]
    for outcome in played:
        faults += outcome.faults
        points.update(outcome.reached)
        totals.update(
            seeds=1,
            workflows=outcome.workflows,
            runs=outcome.runs,
            statements=outcome.statements,
            in_doubt=outcome.in_doubt,
        )
        failed += bool(outcome.broken)
        print(f"seed {outcome.number}: {outcome.said}" + (f" FAILED: {outcome.broken}" if outcome.broken else ""))
        sys.stdout.flush()
    if given.report is not None:
        report = {
            **totals,
            "failed": failed,
            "faults": faults,
            "points": {str(each): points[str(each)] for each in POINTS},
        }
        given.report.write_text(json.dumps(report, indent=1))
    for point in POINTS:
        print(f"{points[str(point)]:5} seeds: {point}")
    print(f"{time.perf_counter() - began:.1f} s; {failed} failed; faults: {dict(faults)}")
    sys.stdout.flush()
    os._exit(min(failed, 100))


if __name__ == "__main__":
    main()
