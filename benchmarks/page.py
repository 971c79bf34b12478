"""What is told of a run of everything: `python -m benchmarks.page` writes it from `results/latest.json`.

The run is kept in `published.json`. README's table of numbers, and the pages of benchmarks and of planning, are made
from that file alone: a test makes them again, and finds the same.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import planning
from benchmarks.__main__ import LATEST, MEASUREMENTS, RESULTS
from benchmarks.figures import short
from benchmarks.published import PUBLISHED, Told

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
EXPLANATION = ROOT / "docs" / "explanation"
PLOTS = EXPLANATION / "benchmarks"
BEGIN, END = "<!-- numbers: python -m benchmarks.page -->\n", "<!-- end of numbers -->\n"
_LEAST_REPEATS = 3


def main() -> int:
    """Returns the exit code: 0, written; 2, the run isn't one to publish."""
    run = json.loads(LATEST.read_text(encoding="utf-8"))
    missing = [name for name in MEASUREMENTS if name not in run["figures"]]
    if missing or run["quick"] or run["repeats"] < _LEAST_REPEATS:
        print(
            f"benchmarks.page: {LATEST.name} isn't a whole run of {_LEAST_REPEATS} repeats or more"
            f"{': ' + ', '.join(missing) + ' wasn’t measured' if missing else ''}; make bench makes one",
            file=sys.stderr,
        )
        return 2
    shutil.copyfile(LATEST, PUBLISHED)
    PLOTS.mkdir(exist_ok=True)
    for name in run["curves"]:
        shutil.copyfile(RESULTS / f"{name}.svg", PLOTS / f"{name}.svg")
    told = Told(run)
    for page, text in PAGES.items():
        (EXPLANATION / page).write_text(text(told), encoding="utf-8")
    README.write_text(in_readme(README.read_text(encoding="utf-8"), told), encoding="utf-8")
    return 0


def in_readme(text: str, told: Told) -> str:
    """README, with the table of this run.

    Raises:
        ValueError: The marks that stand around it are missing.
    """
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"README.md has no {BEGIN.strip()} with {END.strip()} behind it")
    return before + BEGIN + numbers(told) + END + after


def numbers(told: Told) -> str:
    """README's table."""
    run, median = told.run, told.median
    one, two = told.best("drain", "perdure, concurrency"), told.best("drain", "perdure, two")
    floor, dbos, absurd = (told.best("drain", name) for name in ("floor", "dbos", "absurd"))
    rate, theirs, absurds = (median("drain", name) for name in (one, dbos, absurd))
    worker, server, log, commits = (
        median("drain", f"{one}: {part}") for part in ("worker", "server", "log", "commits")
    )
    rows = [
        (
            "drain of one-step workflows, one worker process",
            f"{short(rate)} /s",
            f"{rate / theirs:.0f} times DBOS ({short(theirs)} /s), {rate / absurds:.0f} times Absurd "
            f"({short(absurds)} /s), each at its best setting",
        ),
        (
            "the same, two worker processes",
            f"{short(median('drain', two))} /s",
            f"{median('drain', two) / median('drain', floor):.2f} of the same rows written by plain SQL in batches",
        ),
        (
            "one workflow costs",
            f"{worker:.0f} µs of a worker, {server:.0f} µs of the server",
            f"{short(log)} bytes of log, {short(commits)} commits; "
            f"DBOS: {short(median('drain', f'{dbos}: worker'))} µs, {short(median('drain', f'{dbos}: server'))} µs",
        ),
        (
            "start in one process → first step in another",
            f"{short(median('pickup', 'start to first step, p50'))} ms",
            f"p99 {short(median('pickup', 'start to first step, p99'))} ms",
        ),
        (
            "`app.run` of a one-step workflow",
            f"{short(median('latency', 'app.run, p50'))} ms",
            f"{short(median('latency', 'app.run / insert'))} times one durable insert",
        ),
        (
            "one workflow of 1 000 steps, one after the other",
            f"{short(median('sequence', 'sequential steps'))} steps/s",
            f"the last hundred took {short(median('sequence', 'last hundred / first hundred'))} times as long as the "
            "first",
        ),
        (
            "steps of 40 workflows at once",
            f"{short(median('sequence', 'steps of 40 workflows at once'))} steps/s",
            "",
        ),
        (
            "a backlog that is fed and drained, while a transaction is held open for the whole time",
            f"{short(median('ageing', 'pinned'))} /s",
            f"{short(median('ageing', 'pinned / fresh'))} of what it is without",
        ),
        (
            "an idle worker",
            f"{short(median('idle', 'memory (RSS)'))} MiB",
            f"{short(median('idle', 'processor, worker'))} % of a core, "
            f"{median('idle', 'connections, at most'):.0f} connections",
        ),
    ]
    cells = "\n".join(f"| {what} | {value} | {beside} |" for what, value, beside in rows)
    return (
        f"\n{run['processors']} cores (shared), PostgreSQL {run['postgresql']} beside the workers, fsync on; medians "
        f"of {run['repeats']}, all in one run on one server:\n\n| | | |\n|---|---|---|\n{cells}\n\n"
    )


def benchmarks(told: Told) -> str:
    """All tables and plots."""
    run = told.run
    parts = [_INTRODUCTION.format(**run, day=str(run["at"])[:10])]
    figures: dict[str, list[dict[str, Any]]] = run["figures"]
    reached = sum(bool(figure["passed"]) for all in figures.values() for figure in all)
    missed = [
        f"- *{name}*, {figure['name']}: {_value(figure['median'], figure['unit'])} (target "
        f"{_value(figure['target'], figure['unit'])})"
        for name, all in figures.items()
        for figure in all
        if figure["passed"] is False
    ]
    if missed:
        parts.append(f"Of {reached + len(missed)} targets, these were missed:\n\n" + "\n".join(missed) + "\n")
    for name, all in figures.items():
        plot = f"\n![{name}](benchmarks/{name}.svg)\n" if name in run["curves"] else ""
        parts.append(f"## {name.capitalize()}\n{plot}\n{_table(all)}")
    return "\n".join(parts)


_INTRODUCTION = """# Benchmarks

<!-- Written by `python -m benchmarks.page`. -->

One run of `make bench` on {day}: perdure {perdure}, Python {python}, PostgreSQL {postgresql}, {processors} cores
that others use as well; {repeats} repetitions of everything, in turn. It says what each measurement does in the
first lines of its file in `benchmarks/`.

The server has `fsync`, `synchronous_commit` and `full_page_writes` on, which is checked before anything is
measured, `shared_buffers` of 1 GB and `max_wal_size` of 8 GB, for all alike. What comes from several systems is a
ratio of the same run. Peers run the same one-step workflow, or jobs that do nothing, with what is known to make
them faster; what that was stands at the head of each file in `benchmarks/peers/`. Workers run on uvloop, which
`perdure worker` uses where it is installed. The floor is the same rows written by plain SQL, in batches, with
nothing in between.

One 8 kB `fdatasync` on that machine took {fdatasync_ms} ms. Processor time is that of the process, or of the server
with all its children; log, commits and statements are the server's own counts.
"""


PAGES = {"benchmarks.md": benchmarks, "planning.md": planning.page}


def _table(figures: list[dict[str, Any]]) -> str:
    lines = ["| | median | least | most | target | |", "|---|---:|---:|---:|---|---|"]
    for figure in figures:
        values, target, verdict = figure["values"], "", ""
        if figure["target"] is not None:
            target = f"{'≥' if figure['better'] == 'more' else '≤'} {short(figure['target'])}"
            verdict = "reached" if figure["passed"] else "missed"
        least, most = short(min(values)), short(max(values))
        median = _value(statistics.median(values), figure["unit"])
        lines.append(f"| {figure['name']} | {median} | {least} | {most} | {target} | {verdict} |")
    notes = "".join(f"\n{figure['name']}: {figure['note']}\n" for figure in figures if figure["note"])
    return "\n".join(lines) + "\n" + notes


def _value(value: float, unit: str) -> str:
    return f"{short(value)} {unit}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
