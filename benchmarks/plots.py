"""Plots of what was measured, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures import Curve


def draw(title: str, curves: Sequence[Curve], path: Path) -> None:
    """All curves of a measurement in one picture; the same curves make the same file."""
    import matplotlib as mpl  # it takes a second, and only the end of a run needs it

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "perdure"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.5))
    for curve in curves:
        axes.plot(curve.x, curve.y, label=curve.name, marker="o" if len(curve.x) < 10 else None)
    axes.set(title=title, xlabel=curves[0].across, ylabel=curves[0].up, ylim=(0, None), xlim=(0, None))
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(fontsize="small")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
