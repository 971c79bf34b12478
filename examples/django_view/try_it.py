"""Place orders with Django's test client, and let a worker see to them."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

from django.test import Client

from shop_django import Order, app, create_table, fulfil


async def work() -> None:
    async with app, app.worker():
        async for info in app.workflows(name=fulfil.name):
            print("workflow:", await app.handle(info.id, str).result(timeout=timedelta(seconds=30)))


def main() -> None:
    create_table()
    client: Any = Client(raise_request_exception=False)
    placed = client.post("/orders", {"item": "book"}, content_type="application/json")
    print("placed:", placed.status_code)
    failed = client.post("/orders", {"item": "nothing"}, content_type="application/json")
    print("refused:", failed.status_code)
    print("orders:", [order.item for order in Order.objects.all()])
    asyncio.run(work())
    print("parcels:", [order.parcel for order in Order.objects.all()])
    print("shown:", client.get(f"/orders/{placed.json()['order']}").json())
    app.blocking.close()


if __name__ == "__main__":
    main()
