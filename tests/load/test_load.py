"""More than a worker can do: what waits grows, and nothing else; nothing is lost, and nobody is held up by another.

The suite tries small doses; the marked ones last minutes.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from crash.processes import WorkerProcess
from perdure import App, DatabaseUnavailable, Invocation, KeyConflict, recv, step
from perdure.doctor import Level, examine

from .program import MIB, build

Sql = Callable[..., list[Any]]
Begin = Callable[..., WorkerProcess]

PROGRAM = str(Path(__file__).with_name("program.py"))
CLIENTS = 64
GROWTH_MIB = 32


@pytest.fixture
def begin(database_url: str, schema: str) -> Any:
    """Starts processes of `program.py`, and ends them."""
    processes: list[WorkerProcess] = []

    def start(role: str, **options: Any) -> WorkerProcess:
        process = WorkerProcess(program=PROGRAM, role=role, url=database_url, schema=schema, **options)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.dispose()


def minutes(*doses: float) -> Any:
    """For the suite, and for who has time."""
    first, *others = doses
    return pytest.mark.parametrize("seconds", [first, *(pytest.param(each, marks=pytest.mark.full) for each in others)])


async def until_nothing_waits(sql: Sql, process: WorkerProcess, seconds: float) -> None:
    """Wait until the queue is empty, as long as that makes progress."""
    left, since = None, time.monotonic()
    while (now := sql("SELECT count(*) FROM queue_entries")[0][0]) > 0:
        if now != left:
            left, since = now, time.monotonic()
        assert process.is_alive, process.errors
        assert time.monotonic() - since < seconds, f"{now} workflows are left, and nothing happens"
        await asyncio.sleep(0.1)


async def ends(process: WorkerProcess) -> None:
    process.send(signal.SIGTERM)
    assert await process.ended() == 0, process.errors


@pytest.mark.timeout(900)
@minutes(6, 120)
async def test_above_capacity_what_waits_grows_and_nothing_else(
    app: App, begin: Begin, sql: Sql, tmp_path: Path, seconds: float
) -> None:
    await app.start(Invocation("work", 0))  # the schema is there
    worker = begin("worker", concurrency=10)
    await worker.said("begins")
    clients = [begin("clients", clients=CLIENTS // 2, notes=str(tmp_path / f"{each}")) for each in range(2)]
    for client in clients:
        await client.said("sample", lambda sample: sample["acknowledged"] > 0)
    waiting: list[tuple[int, float]] = []
    for _ in range(4):
        await asyncio.sleep(seconds / 4)
        row = sql("SELECT pending, EXTRACT(epoch FROM now() - oldest_pending_at)::float8 FROM queues")[0]
        waiting.append((row[0], row[1]))
    for client in clients:
        await ends(client)

    pending, age = zip(*waiting, strict=True)
    assert pending[3] > pending[1] > pending[0] > 0, "it isn't above capacity, or nobody sees it"
    assert age[3] > age[0], "what waits doesn't wait longer"
    for process in (worker, *clients):
        most = [sample["mib"] for sample in process.all("sample")]
        assert most[-1] - most[len(most) // 4] < GROWTH_MIB

    helper = begin("worker", concurrency=1000)
    await until_nothing_waits(sql, helper, 30)
    started = {line for each in range(2) for line in (tmp_path / f"{each}").read_text().split()}
    assert len(started) == sum([(await client.said("ends"))["acknowledged"] for client in clients])
    ended = {str(row[0]) for row in sql("SELECT id FROM workflows WHERE status = 'success'")}
    assert started <= ended


async def test_the_doctor_sees_that_workers_do_not_keep_up(app: App, database_url: str, schema: str, sql: Sql) -> None:
    @step
    async def long() -> None:
        await asyncio.Event().wait()

    @app.workflow
    async def slow() -> None:
        await long()

    async with app.worker(concurrency=1, grace=timedelta(0)):
        for _ in range(3):
            await app.start(slow())
        sql("UPDATE queue_entries SET enqueued_at = enqueued_at - interval '3 hours' WHERE worker_id IS NULL")
        found = [each for each in await examine(app.settings) if each.check == "queues"]
    assert [each.level for each in found] == [Level.WARNING]
    assert "2 workflows pending in queue 'default', the oldest for 3 h" in found[0].text


@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.full)])
async def test_a_worker_that_meets_a_full_queue_takes_what_it_has_room_for(
    app: App, begin: Begin, sql: Sql, count: int
) -> None:
    for first in range(0, count, 5000):
        await app.start_many([Invocation("work", number) for number in range(first, min(count, first + 5000))])
    worker = begin("worker", concurrency=200)
    began = (await worker.said("begins"))["mib"]
    most = 0
    while (left := sql("SELECT count(*), count(worker_id) FROM queue_entries")[0])[0]:
        most = max(most, left[1])
        assert worker.is_alive, worker.errors
        await asyncio.sleep(0.05)
    await ends(worker)
    assert 0 < most <= 200 * 2, "it takes more than it can run, and others can't have it"
    assert worker.all("sample")[-1]["mib"] - began < 2 * GROWTH_MIB
    assert sql("SELECT status, count(*) FROM workflows GROUP BY status") == [("success", count)]


@asynccontextmanager
async def held(app: App, url: str, key: str) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A caller's transaction that has started workflows, one under a key, and stays open; commits at the end."""
    async with await psycopg.AsyncConnection.connect(url) as connection:
        await app.start(Invocation("plain", 1), key=key, connection=connection)
        await app.start(Invocation("plain", 2), connection=connection)
        yield connection
        await connection.commit()


@pytest.mark.timeout(900)
@minutes(2, 150)
async def test_a_callers_open_transaction_stops_nobody_else(
    app: App, database_url: str, sql: Sql, seconds: float
) -> None:
    @step
    async def nothing(number: int) -> int:
        return number

    @app.workflow
    async def plain(number: int) -> int:
        return await nothing(number)

    @app.workflow
    async def listener() -> int:
        return await recv("numbers", type=int)

    async def same_key() -> Any:
        while True:
            try:
                return await app.start(plain(1), key="shared")
            except DatabaseUnavailable:
                continue

    async with app.worker(concurrency=50), held(app, database_url, "shared"):
        waits = [asyncio.ensure_future(same_key()) for _ in range(5)]
        until = time.monotonic() + seconds
        rounds = 0
        while time.monotonic() < until:
            rounds += 1
            async with asyncio.timeout(20):
                ears = await app.start_many([listener() for _ in range(5)])
                keyed = [app.start(plain(each), key=f"{rounds} {each}") for each in range(5)]
                results = await asyncio.gather(*keyed, *(app.run(plain(each)) for each in range(5)))
                await asyncio.gather(*(ear.send("numbers", rounds) for ear in ears))
                assert [await ear.result() for ear in ears] == [rounds] * 5
                assert [await each.result() for each in results[:5]] == results[5:] == [0, 1, 2, 3, 4]
        assert rounds > 1
        assert not any(each.done() for each in waits)
        assert sql("SELECT count(*) FROM workflows WHERE key = 'shared'") == [(0,)]
    handles = await asyncio.gather(*waits)
    assert len({handle.id for handle in handles}) == 1
    async with app.worker():
        assert await handles[0].result() == 1
    with pytest.raises(KeyConflict):
        await app.start(plain(2), key="shared", on_conflict="raise")


@pytest.mark.timeout(900)
@minutes(2, 100)
async def test_a_transactional_step_that_stays_open_stops_no_other_sender(
    app: App, database_url: str, seconds: float
) -> None:
    open_now, let_go = asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def connect() -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        async with await psycopg.AsyncConnection.connect(database_url) as connection:
            yield connection

    @app.transaction(using=connect)
    async def stays_open(connection: psycopg.AsyncConnection[Any]) -> None:
        open_now.set()
        while not let_go.is_set():
            await connection.execute("SELECT 1")  # it doesn't idle: the server would end it
            await asyncio.sleep(0.1)

    @app.workflow
    async def busy() -> int:
        await stays_open()
        return await recv("numbers", type=int)

    @app.workflow
    async def listener() -> int:
        return await recv("numbers", type=int)

    async with app.worker(concurrency=50):
        first = await app.start(busy())
        await open_now.wait()
        sent = asyncio.ensure_future(first.send("numbers", 0))
        until = time.monotonic() + seconds
        rounds = 0
        while time.monotonic() < until:
            rounds += 1
            async with asyncio.timeout(20):
                ears = [await app.start(listener()) for _ in range(5)]
                await asyncio.gather(*(ear.send("numbers", rounds) for ear in ears))
                assert [await ear.result() for ear in ears] == [rounds] * 5
        assert rounds > 1
        let_go.set()
        await sent
        assert await first.result() == 0


@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.full)])
async def test_payloads_of_a_mebibyte_need_memory_for_those_under_way(
    database_url: str, schema: str, begin: Begin, sql: Sql, count: int
) -> None:
    """Their code ends faster than they can be written: a worker that went on taking more would hold them all."""

    def text(number: int) -> str:
        return f"{number:08}" + "x" * (MIB - 64)

    async with build({"url": database_url, "schema": schema}) as app:
        handles = [await app.start(Invocation("carry", text(number))) for number in range(count)]
        worker = begin("worker", concurrency=10)
        await worker.said("begins")
        await until_nothing_waits(sql, worker, 30)
        await ends(worker)
        for number, handle in enumerate(handles):
            assert await app.handle(handle.id, str).result() == text(number)[::-1]
    assert sql("SELECT count(*) FROM workflows WHERE status = 'success'") == [(count,)]
    assert worker.all("sample")[-1]["mib"] < 250
