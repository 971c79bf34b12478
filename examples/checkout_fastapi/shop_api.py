"""A shop behind FastAPI: orders are workflows, started once under the key that the client sends.

In development the worker lives in the same process (`SHOP_WORKER=inside`); in production `perdure worker shop_api:app`
runs beside `uvicorn shop_api:api`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Annotated, Any
from uuid import UUID

from fastapi import FastAPI, Header, HTTPException
from pydantic import BaseModel

from perdure import App, Retry, WorkflowNotFound, WrongState, current, saga, set_event, sleep, step

app = App("shop")


class Order(BaseModel):
    """What a customer orders."""

    item: str
    cents: int


@step(retry=Retry(max_attempts=5), idempotent=True)
async def charge(order: Order) -> str:
    """The payment provider leaves out what it has seen under the same key."""
    return f"payment {current().idempotency_key}"


@step(retry=Retry(max_attempts=5), idempotent=True)
async def refund(payment: str) -> None: ...


@step(idempotent=True)
async def ship(order: Order) -> str:
    return f"parcel with {order.item}"


@app.workflow
async def checkout(order: Order) -> str:
    """Charge, wait an hour in which the customer may cancel, ship."""
    async with saga() as undo:
        payment = await charge(order)
        undo.compensate(refund, payment)
        await set_event("stage", "paid")
        await sleep(timedelta(hours=1))
        parcel = await ship(order)
    await set_event("stage", "shipped")
    return parcel


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(app)
        if os.environ.get("SHOP_WORKER") == "inside":
            await stack.enter_async_context(app.worker())
        yield


api = FastAPI(lifespan=lifespan)


@api.post("/orders", status_code=202)
async def place(order: Order, idempotency_key: Annotated[str, Header()]) -> dict[str, Any]:
    """Sent again after a lost answer, it finds the same order."""
    handle = await app.start(checkout(order), key=idempotency_key)
    return {"id": str(handle.id), "is_new": handle.started}


@api.get("/orders/{id}")
async def show(id: UUID) -> dict[str, Any]:
    try:
        info = await app.handle(id).describe()
    except WorkflowNotFound:
        raise HTTPException(404, "there is no such order") from None
    return {"id": str(id), "status": info.status.value, "order": info.input["order"], "parcel": info.output}


@api.post("/orders/{id}/cancel", status_code=202)
async def cancel(id: UUID) -> dict[str, str]:
    try:
        await app.handle(id).cancel(reason="by the customer")
    except WorkflowNotFound:
        raise HTTPException(404, "there is no such order") from None
    except WrongState as error:
        raise HTTPException(409, str(error)) from None
    return {"id": str(id)}
