"""What distance and a slow disk cost, and what a second server brings: a backlog, drained in worse conditions.

The way is a proxy that delays everything; the disk is made slower by `commit_delay`. A claim waits for both, but shares
them with whatever else is claimed at that time: so many in flight hide most of it. The two servers stand beside each
other, each with a worker of its own, and share the processors of one machine.
"""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from tempfile import TemporaryDirectory

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from benchmarks.bench import SETTINGS, Bench
from benchmarks.drain import drain
from benchmarks.figures import Curve, Figure
from benchmarks.processes import role
from perdure import embedded

ROUND_TRIPS = (0, 1, 5, 20)
SLOWER_COMMITS = (2, 10)
CONCURRENCIES = (100, 1_000)
_FURTHEST_ALLOWED = 0.5


@dataclass(frozen=True, slots=True)
class Way:
    """How far away the server is.

    Attributes:
        concurrency: How many workflows are in flight.
        round_trip: In ms.
        commit: By how many ms a commit is slower.
    """

    concurrency: int
    round_trip: int = 0
    commit: int = 0

    def __str__(self) -> str:
        what = f"commits {self.commit} ms slower" if self.commit else f"{self.round_trip} ms away"
        return f"{self.concurrency} in flight, {what}"


WAYS = [
    Way(concurrency, *far)
    for concurrency in CONCURRENCIES
    for far in (*((each, 0) for each in ROUND_TRIPS), *((0, each) for each in SLOWER_COMMITS))
]
MOST = CONCURRENCIES[-1]


def measure(bench: Bench) -> list[Figure | Curve]:
    """Each way in turn, with few and with many in flight; then on two servers."""
    rates: dict[Way, list[float]] = {way: [] for way in WAYS}
    together: list[float] = []
    for _ in range(bench.repeats):
        for way, found in rates.items():
            found.append(_rate(bench, way))
        together.append(_on_two(bench))
    figures: list[Figure | Curve] = [
        Figure(name=str(way), unit="workflows/s", values=found) for way, found in rates.items()
    ]
    for milliseconds in ROUND_TRIPS[1:]:
        pairs = zip(rates[Way(MOST, milliseconds)], rates[Way(MOST)], strict=True)
        figures.append(
            Figure(
                name=f"{Way(MOST, milliseconds)} / beside it",
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
            y=[median(rates[Way(concurrency, each)]) for each in ROUND_TRIPS],
            across="ms of a round trip",
            up="workflows/s",
        )
        for concurrency in CONCURRENCIES
    ]
    return figures


def _rate(bench: Bench, way: Way) -> float:
    """By one worker, all of whose connections go the long way."""
    given = conninfo_to_dict(bench.cluster.url)
    name = f".s.PGSQL.{given.get('port', 5432)}"
    with (
        _slower_commits(bench, way.commit),
        TemporaryDirectory() as folder,
        role("proxy", f"{given['host']}/{name}", f"{folder}/{name}", way.round_trip),
    ):
        return drain(bench, [("worker", way.concurrency)], url=make_conninfo(bench.cluster.url, host=folder)).rate


@contextmanager
def _slower_commits(bench: Bench, milliseconds: int) -> Generator[None]:
    """For sessions that begin in the block."""
    with bench.connect() as connection:
        connection.execute("ALTER ROLE CURRENT_USER SET commit_siblings = 0")
        connection.execute(f"ALTER ROLE CURRENT_USER SET commit_delay = {milliseconds * 1000}".encode())
        try:
            yield
        finally:
            connection.execute("ALTER ROLE CURRENT_USER RESET commit_delay")
            connection.execute("ALTER ROLE CURRENT_USER RESET commit_siblings")


def _on_two(bench: Bench) -> float:
    """The sum of both."""
    with embedded.temporary(SETTINGS) as other, ThreadPoolExecutor(1) as threads:
        with bench.connect(other.url) as connection:
            connection.execute("CREATE EXTENSION pg_stat_statements")
        second = threads.submit(drain, replace(bench, cluster=other), [("worker", MOST)])
        first = drain(bench, [("worker", MOST)])
        return first.rate + second.result().rate
