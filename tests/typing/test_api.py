"""The types of the public surface, as mypy and pyright (strict) see them."""

from __future__ import annotations

from typing import assert_type

from perdure import App, step

app = App("typing")


@step
async def charge(order_id: int, cents: int) -> str:
    return ""


@app.workflow
async def checkout(order_id: int, *, express: bool = False) -> str:
    return await charge(order_id, 999)


async def the_result_is_typed() -> None:
    handle = await app.start(checkout(42))
    assert_type(await handle.result(), str)
