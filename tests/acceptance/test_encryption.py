"""Payloads that only the holders of a key can read."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from perdure import App, ConfigurationError, recv, set_event, step, write_stream
from perdure.encryption import Encryption

Sql = Callable[..., list[Any]]
SOON = timedelta(seconds=20)
SECRET = "4111-1111"


@step
async def charge(card: str) -> str:
    await write_stream("log", f"charging {card}")
    return f"charged {card}"


def build(database_url: str, schema: str, codec: Encryption) -> App:
    app = App("encrypted", database_url=database_url, schema=schema, codec=codec)

    @app.workflow
    async def pay(card: str) -> list[Any]:
        await set_event("card", card)
        return [await charge(card), await recv("more")]

    return app


async def pay(app: App, card: str) -> list[Any]:
    async with app.worker():
        handle = await app.start(app.workflow_functions["pay"](card))
        await handle.send("more", f"more of {card}")
        assert await handle.get_event("card") == card
        return list(await handle.result(timeout=SOON))


async def test_nothing_of_a_payload_stands_in_the_database(database_url: str, schema: str, sql: Sql) -> None:
    async with build(database_url, schema, Encryption(Encryption.new_key())) as app:
        assert await pay(app, SECRET) == [f"charged {SECRET}", f"more of {SECRET}"]
    tables = [name for (name,) in sql("SELECT tablename FROM pg_tables WHERE schemaname = %s", schema)]
    assert {"checkpoints", "message_rows", "event_rows", "stream_rows"} <= set(tables)
    for table in tables:
        for (row,) in sql(f"SELECT row::text FROM {table} AS row"):
            assert SECRET not in row, table
    assert sql("SELECT count(*) FROM stream_rows") == [(1,)]


async def test_keys_are_rotated_while_workflows_go_on(database_url: str, schema: str) -> None:
    old, new = Encryption.new_key(), Encryption.new_key()
    async with build(database_url, schema, Encryption(old)) as app, app.worker():
        handle = await app.start(app.workflow_functions["pay"](SECRET))
        assert await handle.get_event("card", timeout=SOON) == SECRET
    async with build(database_url, schema, Encryption(new, old)) as app, app.worker():
        await app.handle(handle.id).send("more", 1)
        assert await app.handle(handle.id).result(timeout=SOON) == [f"charged {SECRET}", 1]
    async with build(database_url, schema, Encryption(new)) as app:
        with pytest.raises(ValueError, match="a payload can't be decrypted"):
            await app.handle(handle.id).get_event("card")


async def test_what_was_written_before_is_read_unless_it_must_not_be(database_url: str, schema: str) -> None:
    async with App("plain", database_url=database_url, schema=schema) as plain:

        @plain.workflow
        async def tell() -> None:
            await set_event("said", "in the open")

        async with plain.worker():
            handle = await plain.start(tell())
            await handle.result(timeout=SOON)
    key = Encryption.new_key()
    async with build(database_url, schema, Encryption(key)) as app:
        assert await app.handle(handle.id).get_event("said") == "in the open"
    async with build(database_url, schema, Encryption(key, reads_plain=False)) as app:
        with pytest.raises(ValueError, match="isn't encrypted, and reads_plain=False"):
            await app.handle(handle.id).get_event("said")


def test_a_token_that_was_tampered_with_is_refused() -> None:
    codec = Encryption(Encryption.new_key())
    text = codec.encode('"secret"')
    for place in (30, len(text) // 2, len(text) - 5):
        changed = text[:place] + ("A" if text[place] != "A" else "B") + text[place + 1 :]
        with pytest.raises(ValueError, match="tampered with"):
            codec.decode(changed)


@pytest.mark.parametrize("text", ["{}", '"perdure-fernet"', '"größe\\u0000"', "null", '"' + "x" * 100_000 + '"'])
def test_every_text_comes_back(text: str) -> None:
    codec = Encryption(Encryption.new_key())
    assert codec.decode(codec.encode(text)) == text
    assert codec.encode(text) != codec.encode(text), "the same text is stored differently each time"


@pytest.mark.parametrize("key", ["", "short", "x" * 44])
def test_what_is_no_key_is_refused_and_never_shown(key: str) -> None:
    with pytest.raises(ConfigurationError, match=r"key 2 of Encryption\(\.\.\.\) is no key") as caught:
        Encryption(Encryption.new_key(), key)
    assert not key or key not in str(caught.value)
    good = Encryption.new_key()
    assert good not in repr(Encryption(good))
