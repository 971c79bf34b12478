"""What nobody may read in a log: passwords of the database, and what workflows are given and give."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from acceptance.support import SOON
from perdure import App, Retry, recv, set_event, sleep, step, telemetry, write_stream
from perdure.errors import PerdureError

PASSWORD = "hunter2-of-the-database"
SECRET = "4929-1111-2222-3333"


def told(error: BaseException) -> str:
    """All that a traceback would show of an error: its words, its notes, what it came from."""
    words: list[str] = []
    found: BaseException | None = error
    while found is not None:
        words += [str(found), repr(found), *getattr(found, "__notes__", ())]
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return "\n".join(words)


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://me:{PASSWORD}@127.0.0.1:1/none",
        f"postgresql://me:{PASSWORD}@nowhere.invalid:5432/none",
        f"postgresql://me:{PASSWORD}@127.0.0.1:notaport/none",
        f"postgresql://me:{PASSWORD}@[::1/none",
        f"host=127.0.0.1 port=1 password={PASSWORD} nonsense=1",
        f"host=127.0.0.1 port=1 password='{PASSWORD}",
        f"mysql://me:{PASSWORD}@127.0.0.1/none",
        f"me:{PASSWORD}@127.0.0.1/none",
    ],
)
async def test_a_password_is_in_no_error_and_no_log(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    app = App("tests", database_url=url, connect_timeout=timedelta(milliseconds=200))
    async with app:
        with pytest.raises(PerdureError) as caught:
            await app.handle(UUID(int=0)).status()
    assert PASSWORD not in told(caught.value)
    assert PASSWORD not in caplog.text
    assert PASSWORD not in repr(app.settings)
    assert PASSWORD not in repr(app)


async def test_a_wrong_password_is_in_no_error_and_no_log(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    url = make_conninfo(**{**conninfo_to_dict(database_url), "user": "nobody", "password": PASSWORD})
    async with App("tests", database_url=url, connect_timeout=timedelta(milliseconds=200)) as app:
        with pytest.raises(PerdureError) as caught:
            await app.handle(UUID(int=0)).status()
    assert PASSWORD not in told(caught.value) + caplog.text


async def test_payloads_are_in_no_log_and_no_event(app: App, caplog: pytest.LogCaptureFixture) -> None:
    """Not even where steps fail, are tried again, and the database refuses what they gave."""
    caplog.set_level(logging.DEBUG, logger="perdure")
    events: list[Any] = []
    unsubscribe = telemetry.subscribe(events.append)
    attempts = 0

    @step(retry=Retry(max_attempts=2, initial=timedelta(milliseconds=1)))
    async def charge(card: str) -> str:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise ConnectionError("the bank is away")
        return card

    @app.workflow
    async def child(card: str) -> str:
        await sleep(timedelta(milliseconds=1))
        return card

    @app.workflow
    async def flow(card: str) -> str:
        got = await charge(card)
        await set_event("card", got)
        await write_stream("cards", got)
        await child(got)
        return str(await recv("cards"))

    @app.workflow
    async def refused(card: str) -> Any:
        return object() if card else card

    async with app.worker():
        handle = await app.start(flow(SECRET), attributes={"card": SECRET})
        await handle.send("cards", SECRET)
        assert await handle.result(timeout=SOON) == SECRET
        with pytest.raises(Exception, match="refused") as caught:
            await (await app.start(refused(SECRET))).result(timeout=SOON)
    unsubscribe()
    assert SECRET not in told(caught.value)
    assert SECRET not in caplog.text
    assert len(events) > 10
    assert SECRET not in "\n".join(map(repr, events))
