"""What distance costs, and what a second server brings: a backlog drained over longer and longer ways, and on two.

The way is a proxy that delays everything. A workflow needs two round trips at least, to be claimed and to be written,
but shares them with whatever else is claimed and written at that time: so many in flight hide most of it. The two
servers stand beside each other, each with a worker of its own, and share the processors of one machine: together they
can't do more than one that has both, only as much.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from statistics import median
from tempfile import TemporaryDirectory

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from benchmarks.bench import SETTINGS, Bench
from benchmarks.drain import drain
from benchmarks.figures import Curve, Figure
from benchmarks.processes import role
from perdure import embedded

ROUND_TRIPS = (0, 1, 5, 20)
CONCURRENCIES = (100, 1_000)
_FURTHEST_ALLOWED = 0.5


def measure(bench: Bench) -> list[Figure | Curve]:
    """Over each way in turn, with few and with many in flight; then on two servers."""
    rates: dict[tuple[int, int], list[float]] = {
        (concurrency, milliseconds): [] for concurrency in CONCURRENCIES for milliseconds in ROUND_TRIPS
    }
    together: list[float] = []
    for _ in range(bench.repeats):
        for (concurrency, milliseconds), found in rates.items():
            found.append(_over(bench, milliseconds, concurrency))
        together.append(_on_two(bench))
    most = CONCURRENCIES[-1]
    figures: list[Figure | Curve] = [
        Figure(name=_name(*key), unit="workflows/s", values=found) for key, found in rates.items()
    ]
    for milliseconds in ROUND_TRIPS[1:]:
        pairs = zip(rates[most, milliseconds], rates[most, 0], strict=True)
        figures.append(
            Figure(
                name=f"{_name(most, milliseconds)} / none",
                unit="times",
                values=[far / near for far, near in pairs],
                target=_FURTHEST_ALLOWED,
            )
        )
    figures.append(Figure(name="two servers, a worker each", unit="workflows/s", values=together))
    figures += [
        Curve(
            name=f"{concurrency} in flight",
            x=ROUND_TRIPS,
            y=[median(rates[concurrency, milliseconds]) for milliseconds in ROUND_TRIPS],
            across="ms of a round trip",
            up="workflows/s",
        )
        for concurrency in CONCURRENCIES
    ]
    return figures


def _name(concurrency: int, milliseconds: int) -> str:
    return f"{concurrency} in flight, {milliseconds} ms"


def _over(bench: Bench, milliseconds: int, concurrency: int) -> float:
    """By one worker, all of whose connections go the long way."""
    given = conninfo_to_dict(bench.cluster.url)
    name = f".s.PGSQL.{given.get('port', 5432)}"
    with TemporaryDirectory() as folder, role("proxy", f"{given['host']}/{name}", f"{folder}/{name}", milliseconds):
        return drain(bench, [("worker", concurrency)], url=make_conninfo(bench.cluster.url, host=folder)).rate


def _on_two(bench: Bench) -> float:
    """The sum of both."""
    with embedded.temporary(SETTINGS) as other, ThreadPoolExecutor(1) as threads:
        with bench.connect(other.url) as connection:
            connection.execute("CREATE EXTENSION pg_stat_statements")
        second = threads.submit(drain, replace(bench, cluster=other), [("worker", CONCURRENCIES[-1])])
        first = drain(bench, [("worker", CONCURRENCIES[-1])])
        return first.rate + second.result().rate
