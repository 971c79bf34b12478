"""The numbers that the documentation tells come from one published run, and from nowhere else."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import page
from benchmarks.__main__ import MEASUREMENTS
from benchmarks.published import PUBLISHED, Told, published


@pytest.fixture
def told() -> Told:
    return published()


def test_readme_has_the_numbers_of_the_published_run(told: Told) -> None:
    readme = page.README.read_text(encoding="utf-8")
    assert page.in_readme(readme, told) == readme, "run `python -m benchmarks.page`"


@pytest.mark.parametrize("name", page.PAGES)
def test_a_page_of_numbers_is_made_from_the_published_run(name: str, told: Told) -> None:
    written = (page.EXPLANATION / name).read_text(encoding="utf-8")
    assert written == page.PAGES[name](told), "run `python -m benchmarks.page`"


def test_the_published_run_measured_everything_often_enough(told: Told) -> None:
    assert set(MEASUREMENTS) <= set(told.run["figures"])
    assert not told.run["quick"]
    assert told.run["repeats"] >= 3
    for all in told.run["curves"].values():
        assert all


def test_a_number_that_was_changed_by_hand_is_found(told: Told) -> None:
    readme = page.README.read_text(encoding="utf-8")
    start = readme.index(page.BEGIN)
    changed = readme[:start] + re.sub(r"\d,\d{3} /s", "99,999 /s", readme[start:], count=1)
    assert changed != readme
    assert page.in_readme(changed, told) == readme


def test_readme_without_its_marks_is_refused(told: Told) -> None:
    with pytest.raises(ValueError, match="no <!-- numbers"):
        page.in_readme("# perdure\n", told)


@pytest.mark.parametrize("flaw", [{"quick": True}, {"repeats": 1}, {"figures": {}}])
def test_a_run_that_is_not_whole_is_not_published(
    flaw: dict[str, object],
    told: Told,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    latest = tmp_path / "latest.json"
    latest.write_text(json.dumps(told.run | flaw))
    monkeypatch.setattr(page, "LATEST", latest)
    before = PUBLISHED.read_bytes()
    assert page.main() == 2
    assert "isn't a whole run" in capsys.readouterr().err
    assert PUBLISHED.read_bytes() == before
