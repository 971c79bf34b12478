"""`make reliability`: simulation, rules switched off, chaos, failover and hostile rows, one after the other.

What came of it is written into docs/explanation/reliability.md.

Arguments: `--seeds 1000 --rule-seeds 400 --minutes 5 --rounds 200`; exit code 1: something went wrong, and nothing is
written. With `--folder F`, what had come to its end by then isn't run again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "explanation" / "reliability.md"


@dataclass
class Results:
    """What came of each part."""

    simulation: dict[str, Any]
    rules: tuple[int, int]
    chaos: dict[str, Any]
    failovers: dict[str, float]
    rounds: int


def main() -> int:
    """Run all of it."""
    parser = argparse.ArgumentParser(prog="make reliability", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--rule-seeds", type=int, default=400)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="where the parts leave what came of them, to go on from there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kept = given.folder or Path(folder)
        kept.mkdir(parents=True, exist_ok=True)
        results = run(given, kept.resolve())
    PAGE.write_text(page(results))
    print(f"written: {PAGE.relative_to(TESTS.parent)}")
    return 0


def run(given: argparse.Namespace, folder: Path) -> Results:
    """Each part, in a process of its own; those that take long come last. What is in the folder isn't run again."""
    failovers = folder / "failover.xml"
    if not failovers.exists():
        running = folder / "failover.running.xml"
        _python("-m", "pytest", "-q", "chaos/test_failover.py", f"--junitxml={running}", "-o", "junit_family=xunit1")
        running.rename(failovers)
    rounds = folder / "rounds"
    if not rounds.exists():
        hostile = {"PERDURE_FUZZ_ROUNDS": str(given.rounds), "PERDURE_FUZZ_EXAMPLES": str(given.rounds * 10)}
        _python("-m", "pytest", "-q", "-n", "2", "fuzz", **hostile)
        rounds.write_text(str(given.rounds))
    chaos = folder / "chaos" / "report.json"
    if not chaos.exists():
        _python("-m", "chaos", "--minutes", f"{given.minutes:g}", "--folder", str(chaos.parent))
    rules = folder / "rules"
    if not rules.exists():
        rules.write_text(_python("-m", "simulation", "--seeds", f"0-{given.rule_seeds - 1}", "--rules"))
    simulation = folder / "simulation.json"
    if not simulation.exists():
        _python("-m", "simulation", "--seeds", f"0-{given.seeds - 1}", "--report", str(simulation))
    failing = len(re.findall(r": seed \d+: ", rules.read_text()))
    return Results(
        simulation=json.loads(simulation.read_text()),
        rules=(failing, len(re.findall(r"NO SEED FAILS", rules.read_text())) + failing),
        chaos=json.loads(chaos.read_text()),
        failovers={
            case.get("name", ""): float(each.get("value", "nan"))
            for case in ElementTree.parse(failovers).iter("testcase")
            for each in case.iter("property")
        },
        rounds=int(rounds.read_text()),
    )


def _python(*arguments: str, **variables: str) -> str:
    """What it has printed; it must succeed."""
    print("python", *arguments, flush=True)
    env = {**os.environ, "PYTHONHASHSEED": "0", **variables}
    done = subprocess.run([sys.executable, *arguments], cwd=TESTS, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        failed = "\n".join(re.findall(r"^.*FAIL.*$", done.stdout, re.MULTILINE))
        sys.exit(f"it failed:\n{failed or done.stdout[-5000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def page(results: Results) -> str:
    """The page, with the numbers of this run."""
    seen, chaos = results.simulation, results.chaos
    faults, counts = seen["faults"], chaos["counts"]
    cut = sum(faults.get(kind, 0) for kind in ("is_lost", "is_undone", "is_silent"))
    hung = sum(count for kind, count in faults.items() if kind.startswith("hangs"))
    strikes = {
        "workers killed": (faults.get("kill", 0), counts.get("SIGKILL", 0)),
        "workers frozen": (faults.get("freeze", 0), counts.get("SIGSTOP", 0)),
        "workers told to stop": (faults.get("terminate", 0), counts.get("SIGTERM", 0)),
        "workers cut off from the server": (faults.get("partition", 0), counts.get("black hole", 0)),
        "crashes of the server": (faults.get("restart", 0), counts.get("server crash", 0)),
        "times that sessions were thrown out": (faults.get("throw out", 0), counts.get("sessions thrown out", 0)),
        "failovers that lost the last transactions": (faults.get("lost tails", 0), 0),
        "times that the server's clock was set": (faults.get("clock", 0), 0),
        "connections cut (simulation: single requests)": (cut, counts.get("connections cut", 0)),
        "requests that hung (chaos: slow connections)": (hung, counts.get("slow connections", 0)),
        "flushes whose commit was in doubt": (seen["in_doubt"], "not counted"),
    }
    rows = "\n".join(f"| {what} | {simulated} | {real} |" for what, (simulated, real) in strikes.items())
    points = "\n".join(f"| {point} | {count} |" for point, count in seen["points"].items())
    ended = sum(chaos["ended"].values())
    (patroni,) = (f"{took:g}" for name, took in results.failovers.items() if "patroni" in name)
    (promoted,) = (f"{took:g}" for name, took in results.failovers.items() if "patroni" not in name)
    return f"""# Reliability: what was tried, and what came of it

This page is written by `make reliability`, from its run of {datetime.now(UTC):%Y-%m-%d}; anybody can repeat it.

**Lost: nothing. Done twice that must be done once: nothing.** The simulation played {seen["seeds"]} courses of
events with {seen["workflows"]} workflows in {seen["runs"]} runs and {seen["statements"]} statements; the chaos test
attacked real processes for {chaos["seconds"] / 60:g} minutes, in which {chaos["acknowledged"]} starts were
acknowledged and {ended} workflows ended.

| | simulation | chaos |
|---|---:|---:|
{rows}

Hostile rows: {results.rounds} databases, each with 16 rows changed, added or deleted at random, half of them while
a worker ran: each went on with everything else.

Failover to a synchronous standby, with real servers and real workers that nobody restarts, from the death of the
primary to the end of the next workflow: {promoted} s where the standby is promoted at once, {patroni} s under Patroni,
which waits for 20 s before it promotes. No acknowledged start was lost.

## What each of them is

- **Simulation** (`tests/simulation/`, `make simulation`): all processes on one event loop with virtual time, real
  statements on a real PostgreSQL, and between them a network that obeys a seed. See decision 19. At any time and at
  the end it looks at what must hold: no workflow is lost, none is both pending and waiting, nothing of an old epoch
  is written behind the load of a newer run, an effect begins on nothing that isn't durable, each workflow ends on
  the path that all its effects stood on, messages come once and in order, no worker believes in a lease that has
  run out, none runs more workflows at a time than it may, and no step is tried more often.
- **Rules switched off** (`make simulation ARGS=--rules`): a simulation that finds nothing may be blind. Of
  {results.rules[1]} rules of the protocols, {results.rules[0]} made a seed fail when they were switched off.
- **Chaos** (`tests/chaos/`, `make chaos`): a bank with worker processes, SIGKILL, SIGSTOP beyond the lease, crashes
  of the server, a proxy that cuts connections; at the end the books must balance.
- **Hostile rows** (`tests/fuzz/`): anything that the tables' types let through.
- **A model** (`tests/model/`): claim, flush, suspension and wake in Promela, searched whole; four wrong variants
  fail.

## The named places, and how many seeds came there

| place | seeds |
|---|---:|
{points}

"""


if __name__ == "__main__":
    sys.exit(main())
