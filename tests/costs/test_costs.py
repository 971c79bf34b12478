"""A ratchet: what a workflow costs may not grow by a tenth, nor shrink by one without being written down.

`PERDURE_WRITE_COSTS=1` writes down what is counted now; say in the commit why.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
WRITTEN = Path(__file__).with_name("costs.json")
TENTH = 0.1
LEAST = {"statements": 0.01}
"""Where what is counted is a small fraction, a tenth of it is less than one more in all."""


def counted() -> dict[str, dict[str, float]]:
    done = subprocess.run(
        [sys.executable, "-m", "costs"],
        cwd=TESTS,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.timeout(300)
def test_nothing_costs_more_than_it_did() -> None:
    now = counted()
    if os.environ.get("PERDURE_WRITE_COSTS"):
        WRITTEN.write_text(json.dumps({"python": sys.version_info[:2], "costs": now}, indent=1) + "\n")
    written = json.loads(WRITTEN.read_text())
    same_python = tuple(written["python"]) == sys.version_info[:2]
    faults = []
    for scenario, costs in written["costs"].items():
        for what, cost in costs.items():
            room = max(cost * TENTH, LEAST.get(what, 0.0))
            found = now[scenario][what]
            if not cost - room <= found <= cost + room and (same_python or "calls" not in what):
                faults.append(f"{scenario}: {found} {what}, where it was {cost}")
    assert not faults, "\n".join(faults)
    assert now.keys() == written["costs"].keys(), "PERDURE_WRITE_COSTS=1 writes down what a new scenario costs"


def test_what_is_counted_is_counted() -> None:
    """By hand: a workflow of one step is a row, an entry (inserted, claimed, deleted), and three checkpoints."""
    costs = json.loads(WRITTEN.read_text())["costs"]["a workflow of one step"]
    assert costs["rows"] == 7.0
    assert 0 < costs["statements"] < 0.1, "many share a statement"
    assert 50 < costs["own calls"] < 500
