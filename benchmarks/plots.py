"""Plots of what was measured, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures import Curve


def draw(title: str, curves: Sequence[Curve], path: Path) -> None:
    """All curves of a measurement in one picture, those that tell of the same on the same axes.

    The same curves make the same file.
    """
    import matplotlib as mpl  # it takes a second, and only the end of a run needs it

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "perdure"
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(curve.up for curve in curves))
    figure, rows = pyplot.subplots(len(kinds), figsize=(8, 3.5 * len(kinds)), squeeze=False)
    for (axes,), up in zip(rows, kinds, strict=True):
        of_this = [curve for curve in curves if curve.up == up]
        for curve in of_this:
            axes.plot(curve.x, curve.y, label=curve.name, marker="o" if len(curve.x) < 10 else None)
        axes.set(xlabel=of_this[0].across, ylabel=up, ylim=(0, None), xlim=(0, None))
        axes.grid(alpha=0.3)
        if len(of_this) > 1:
            axes.legend(fontsize="small")
    rows[0][0].set_title(title)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
