"""Figures: what was measured, over and over, and what it should be; and curves, which are drawn."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One thing that was measured, in every repetition.

    Attributes:
        name: What it is: "perdure, concurrency 100".
        unit: "workflows/s", "ms".
        values: One value a repetition.
        target: What the median has to reach; None: it is there for comparison.
        better: Which direction is the good one.
        note: What a reader has to know.
    """

    name: str
    unit: str
    values: Sequence[float]
    target: float | None = None
    better: Literal["more", "less"] = "more"
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def passed(self) -> bool | None:
        """Whether the target is reached; None: there is none."""
        if self.target is None:
            return None
        return self.median >= self.target if self.better == "more" else self.median <= self.target

    @property
    def ratio(self) -> float | None:
        """How far the median is on the good side of the target: 1 is just enough, 2 twice as good; None: no ratio."""
        if self.target is None or self.median <= 0 or not self.target:
            return None
        return self.median / self.target if self.better == "more" else self.target / self.median

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "median": self.median, "passed": self.passed, "ratio": self.ratio}


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One line of a plot, out of one repetition or the medians of all.

    Attributes:
        name: What it is.
        x, y: Its points.
        across, up: What they are, with their units.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    across: str
    up: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON, in which more digits than these say nothing."""
        return {**asdict(self), "x": [float(f"{x:.5g}") for x in self.x], "y": [float(f"{y:.5g}") for y in self.y]}


def distribution(name: str, milliseconds: Sequence[float]) -> Curve:
    """How many percent of the times were shorter than this."""
    percent = [*range(1, 100), 99.5]
    times = sorted(milliseconds)
    x = [times[min(len(times) - 1, int(len(times) * share / 100))] for share in percent]
    return Curve(name=name, x=x, y=percent, across="ms", up="% of them within")


def table(title: str, figures: Sequence[Figure]) -> str:
    """The figures, for people."""
    rows = [("", "median", "least", "most", "unit", "target", "")]
    for figure in figures:
        target = verdict = ""
        if figure.target is not None:
            target = f"{'>=' if figure.better == 'more' else '<='} {short(figure.target)}"
            ratio = "" if figure.ratio is None else f" ({figure.ratio:.2f} x)"
            verdict = f"{'PASS' if figure.passed else 'FAIL'}{ratio}"
        least, most = short(min(figure.values)), short(max(figure.values))
        rows.append((figure.name, short(figure.median), least, most, figure.unit, target, verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [title]
    for row in rows:
        cells = (
            text.rjust(width) if column in (1, 2, 3) else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  " + "  ".join(cells).rstrip())
    lines += [f"  * {figure.name}: {figure.note}" for figure in figures if figure.note]
    return "\n".join(lines)


def short(value: float) -> str:
    """Three digits, or all before the point."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
