"""The shop, asked over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx

import shop_api
from shop_api import Order, api, app, checkout

ORDER = {"item": "book", "cents": 1999}


@asynccontextmanager
async def shop(perdure_app: Any) -> AsyncIterator[tuple[Any, httpx.AsyncClient]]:
    """The app on a schema of the test's own, its worker in the kit, and somebody who asks it."""
    async with (
        perdure_app(app) as kit,
        httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://shop") as http,
    ):
        yield kit, http


async def test_an_order_that_is_sent_twice_is_one(perdure_app: Any) -> None:
    async with shop(perdure_app) as (kit, http):
        first, second = [await http.post("/orders", json=ORDER, headers={"Idempotency-Key": "a"}) for _ in range(2)]
        assert (first.status_code, second.status_code) == (202, 202)
        assert first.json()["id"] == second.json()["id"]
        assert (first.json()["is_new"], second.json()["is_new"]) == (True, False)
        await kit.clock.advance(timedelta(hours=1))
        await kit.idle()
        shown = (await http.get(f"/orders/{first.json()['id']}")).json()
        assert (shown["status"], shown["parcel"], shown["order"]) == ("success", "parcel with book", ORDER)


async def test_an_order_can_be_cancelled_within_the_hour_and_is_refunded(perdure_app: Any) -> None:
    async with shop(perdure_app) as (kit, http):
        refunds = kit.fake(shop_api.refund, returns=None)
        id = (await http.post("/orders", json=ORDER, headers={"Idempotency-Key": "b"})).json()["id"]
        await kit.idle()
        assert (await http.post(f"/orders/{id}/cancel")).status_code == 202
        await kit.idle()
        assert (await http.get(f"/orders/{id}")).json()["status"] == "cancelled"
        assert len(refunds.calls) == 1
        other = (await http.post("/orders", json=ORDER, headers={"Idempotency-Key": "c"})).json()["id"]
        await kit.finish(app.handle(UUID(other)))
        refused = await http.post(f"/orders/{other}/cancel")
        assert (refused.status_code, "nothing left to cancel" in refused.json()["detail"]) == (409, True)


async def test_what_is_not_there_or_makes_no_sense_is_said(perdure_app: Any) -> None:
    async with shop(perdure_app) as (_, http):
        assert (await http.get(f"/orders/{uuid4()}")).status_code == 404
        assert (await http.post("/orders", json={"item": "book"}, headers={"Idempotency-Key": "d"})).status_code == 422
        assert (await http.post("/orders", json=ORDER)).status_code == 422, "without a key"


async def test_a_crash_charges_and_ships_once(perdure_app: Any) -> None:
    async with perdure_app(app) as kit:
        report = await kit.crash_everywhere(checkout(Order(**ORDER)))
        assert report.reran == ()
