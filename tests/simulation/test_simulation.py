"""A small dose of the simulation: 200 seeds, the same each time. More of them: `make simulation SEEDS=0-9999`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
SEEDS = 200


def simulation(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Play seeds, in processes of their own, whose sets and dictionaries have the same order each time."""
    return subprocess.run(
        [sys.executable, "-m", "simulation", *arguments],
        cwd=TESTS,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )


def played(output: str) -> dict[int, str]:
    """What each seed has said: without what it took."""
    found = re.findall(r"^seed (\d+): (.*)$", output, re.MULTILINE)
    return {int(number): re.sub(r" in [0-9.]+ s,", "", said) for number, said in found}


@pytest.mark.timeout(1500)
def test_nothing_breaks_and_every_named_place_is_reached() -> None:
    done = simulation("--seeds", f"0-{SEEDS - 1}")
    seeds = played(done.stdout)
    failed = re.findall(r"^seed .* FAILED: .*$", done.stdout, re.MULTILINE)
    assert not failed, "\n".join(failed)
    assert len(seeds) == SEEDS
    assert not re.findall(r"^ +0 seeds: .*$", done.stdout, re.MULTILINE)


def test_a_seed_gives_the_same_course_of_events_each_time() -> None:
    first, second = simulation("--seeds", "17-18"), simulation("--seeds", "17-18", "--jobs", "1")
    assert len(played(first.stdout)) == 2
    assert played(first.stdout) == played(second.stdout)


def test_a_rule_that_is_switched_off_makes_a_seed_fail() -> None:
    done = simulation("--seeds", "0-1", "--rules", "--only", "7")
    assert done.returncode == 0
    assert re.search(r"^an effect begins when everything before it is durable: seed 0: ", done.stdout, re.MULTILINE)


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_each_rule_that_is_switched_off_makes_a_seed_fail() -> None:
    done = simulation("--seeds", "0-999", "--rules")
    assert done.returncode == 0, done.stdout
