"""The page that says how much a machine will do: made of the costs of a published run, and held against that run."""

from __future__ import annotations

from benchmarks.distance import CONCURRENCIES, MOST, WAYS, Way
from benchmarks.figures import short
from benchmarks.published import Told

LEGS = 1.25
"""How many round trips and commits a slot waits for between two workflows: a claim's, and a part of the next one's."""


def predicted(told: Told, way: Way) -> float:
    """Workflows a second: what the same number in flight do beside the server, and what a slot waits for besides."""
    near = told.median("distance", str(Way(way.concurrency)))
    seconds = way.concurrency / near + LEGS * (way.round_trip + way.commit) / 1000
    return way.concurrency / seconds


def page(told: Told) -> str:
    """docs/explanation/planning.md."""
    one = told.best("drain", "perdure, concurrency")
    cost = {
        part: told.median("drain", f"{one}: {part}") for part in ("worker", "server", "log", "commits", "statements")
    }
    step = 1000 / told.median("sequence", "sequential steps")
    insert = told.median("sequence", "one durable insert, p50")
    rows = "\n".join(
        f"| {way} | {short(predicted(told, way))} | {short(told.median('distance', str(way)))} |"
        for way in WAYS
        if way.round_trip or way.commit
    )
    together = told.median("sequence", "steps of 40 workflows at once")
    shares = [told.median("distance", str(way)) / predicted(told, way) for way in WAYS if way.round_trip or way.commit]
    return _TEXT.format(
        **{name: short(value) for name, value in cost.items()},
        of_worker=short(1e6 / cost["worker"]),
        of_server=short(1e6 / cost["server"]),
        log_at_1000=short(cost["log"] * 1000 / 1e6),
        step=short(step),
        together=short(together),
        insert=short(insert),
        legs=LEGS,
        rows=rows,
        least=f"{min(shares):.2f}",
        most=f"{max(shares):.2f}",
        few=CONCURRENCIES[0],
        many=f"{MOST:,}",
        near=short(told.median("distance", str(Way(MOST)))),
        two=short(told.median("distance", "two servers, a worker each")),
        processors=told.run["processors"],
    )


_TEXT = """# Planning: how much will it do?

<!-- Written by `python -m benchmarks.page`. -->

A workflow of one step, with arguments and a result of 100 bytes, costs (see [Benchmarks](benchmarks.md)):

| | |
|---|---:|
| processor, worker | {worker} µs |
| processor, server | {server} µs |
| log (WAL) | {log} bytes |
| commits | {commits} |
| statements | {statements} |

Further steps cost less: forty workflows of a thousand steps do {together} steps a second, on the same cores. Four
things bound what you get; the smallest of them counts.

**Processors of the workers.** A worker process uses one core: at most {of_worker} of these workflows a second, less
what your own code takes. More processes, on as many machines as you like, add up.

**Processors of the server.** At most {of_server} of these workflows a second for each of its cores. It also has to
write its log: {log_at_1000} MB/s for each thousand a second, and more with larger payloads.

**What is in flight.** A slot of a worker (`concurrency=`) is taken from the claim of a workflow to the end of its
code. The claim has to go to the server, be committed there, and come back; all that is claimed at that time shares
it. So with N slots, a round trip of t and a commit (fsync) of f,

    workflows a second = N / (N / R + {legs} (t + f))

where R is what N slots do beside the server. If that is less than the processors allow, raise `concurrency`.

**Steps that wait for each other.** A step with an effect begins when everything before it is durable: a round trip
and a commit for each, whatever else goes on. Here one took {step} ms, of which {insert} ms are a durable insert.
Workflows beside each other share commits; `pure=True` steps wait for nothing.

## Held against a measurement

A worker behind a proxy that delays everything, and a server whose commits are slower, {few} and {many} workflows in
flight:

| | predicted, /s | measured, /s |
|---|---:|---:|
{rows}

What was measured is between {least} and {most} of what was predicted: whatever waits longer travels in larger batches,
which cost less, and the formula leaves that out.

## More than one server

An app lives in one database. Two apps in two databases know nothing of each other: what they do adds up, as far as
there are processors. Two servers beside each other on {processors} cores, a worker each, did {two} workflows a
second together; one server with one worker did {near}.
"""
