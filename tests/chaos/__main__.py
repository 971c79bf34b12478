"""`make chaos MINUTES=5`: attacks workers, server and connections for so long, and says what came of it.

Writes `report.json` and `timeline.svg` into `chaos-report/`; exit code 1: something was lost, done twice, or got stuck.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import sys
from pathlib import Path
from statistics import median

from chaos.storm import Report, Storm
from perdure import embedded

_COLOURS = {
    "SIGKILL": "tab:red",
    "SIGSTOP": "tab:blue",
    "SIGTERM": "tab:orange",
    "server crash": "black",
    "sessions thrown out": "tab:purple",
    "connections cut": "tab:green",
    "black hole": "tab:gray",
    "slow connections": "tab:olive",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=None, help="the order of the faults; by default another each time")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("chaos-report"))
    given = parser.parse_args()
    seed = random.randrange(1_000_000) if given.seed is None else given.seed
    given.folder.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as spare:
        port = spare.getsockname()[1]
    settings = {"fsync": "on", "listen_addresses": "127.0.0.1", "port": str(port)}
    print(f"seed {seed}, {given.minutes:g} min, {given.workers} workers", flush=True)
    with embedded.temporary(settings) as cluster:
        storm = Storm(cluster, seconds=given.minutes * 60, seed=seed, folder=given.folder, workers=given.workers)
        report = asyncio.run(storm.run())
    (given.folder / "report.json").write_text(json.dumps(report.as_dict(), indent=1))
    plot(report, given.folder / "timeline.svg")
    print(told(report))
    return 1 if report.wrong else 0


def told(report: Report) -> str:
    """The report in words."""
    recovered: dict[str, list[float]] = {}
    for fault in report.faults:
        if fault.recovered is not None:
            recovered.setdefault(fault.kind, []).append(fault.recovered)
    lines = [
        f"{kind:<22} {count:>4} times; the next workflow ended after {median(times):.2f} s, {max(times):.2f} s at most"
        for kind, count in sorted(report.counts.items())
        if (times := recovered.get(kind))
    ]
    lines.append(f"starts acknowledged: {report.acknowledged}; given up and tried again: {report.unavailable}")
    lines.append(f"ended: {', '.join(f'{count} {what}' for what, count in sorted(report.ended.items()))}")
    lines.append(
        f"plain steps that ran once more: {report.reruns}; all ended {report.settled_in} s after the last fault"
    )
    lines.append("\n".join(report.wrong) if report.wrong else "nothing lost, nothing twice, the books balance")
    return "\n".join(lines)


def plot(report: Report, path: Path) -> None:
    """Throughput over time, and what was done to it."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(12, 4))
    window = 8
    samples = report.samples
    rates = [
        (after[0], (after[1] - before[1]) / (after[0] - before[0]))
        for before, after in zip(samples, samples[window:], strict=False)
        if after[0] > before[0]
    ]
    axes.plot([at for at, _ in rates], [rate for _, rate in rates], color="0.3", linewidth=1)
    seen: set[str] = set()
    for fault in report.faults:
        axes.axvline(
            fault.at, color=_COLOURS[fault.kind], alpha=0.6, linewidth=1, label="" if fault.kind in seen else fault.kind
        )
        seen.add(fault.kind)
    axes.set(xlabel="seconds", ylabel="workflows ended a second", title=f"seed {report.seed}", ylim=(0, None))
    axes.legend(fontsize="small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
