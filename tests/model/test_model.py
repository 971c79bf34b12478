"""The model of start, claim, flush, lease, suspend and wake holds; each variant that is known to be bad does not."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).with_name("perdure.pml")
BAD = {
    "SNAPSHOT_FENCE": "ghost==tenure",  # a write of a tenure that is over was accepted
    "NO_WAKE_COUNTER": "ended&&(recorded==2)",  # it sleeps for ever
    "EPOCH_RESET": "ghost==tenure",
    "CLAIM_AND_LOAD": "known==recorded",  # it would run again what is recorded
}


def explored(folder: Path, variant: str | None) -> str:
    """What spin says of it, all states explored."""
    for program, package in (("spin", "spin"), ("gcc", "gcc")):
        assert shutil.which(program), f"{program} is missing; on Debian: apt-get install {package}"
    define = [] if variant is None else [f"-D{variant}"]
    subprocess.run(["spin", *define, "-a", str(MODEL)], cwd=folder, check=True, capture_output=True)
    subprocess.run(["gcc", "-w", "-O2", "-DSAFETY", "-o", "pan", "pan.c"], cwd=folder, check=True)
    # -E: who waits for ever is no error by itself; the assertion at the model's timeout says whether it should.
    said = subprocess.run(["./pan", "-E", "-m1000000"], cwd=folder, check=False, capture_output=True, text=True).stdout
    assert "max search depth too small" not in said
    return said


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_protocol_holds_in_every_order(tmp_path: Path) -> None:
    said = explored(tmp_path, None)
    assert "errors: 0" in said, said
    found = re.search(r"(\d+) states, stored", said)
    assert found is not None
    assert int(found[1]) > 1_000_000


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("variant", BAD)
def test_what_is_known_to_be_bad_breaks_what_it_should(tmp_path: Path, variant: str) -> None:
    said = explored(tmp_path, variant)
    violated = re.search(r"assertion violated (.*) \(at depth", said)
    assert violated is not None, said
    assert BAD[variant] in violated[1]
