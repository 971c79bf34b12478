"""The app in the image: a workflow of two steps, the second of which takes a while."""

from __future__ import annotations

import asyncio
import os
import sys

from perdure import App, step

app = App("shop", schema=os.environ.get("PERDURE_SCHEMA", "perdure"))


@step(idempotent=True)
async def pack(order_id: int) -> str:
    print(f"packing {order_id}", file=sys.stderr, flush=True)
    return f"parcel {order_id}"


@step(idempotent=True)
async def wait_for_the_van() -> None:
    print("waiting", file=sys.stderr, flush=True)
    await asyncio.sleep(float(os.environ.get("VAN_SECONDS", "3600")))


@app.workflow
async def ship(order_id: int) -> str:
    parcel = await pack(order_id)
    await wait_for_the_van()
    return parcel
