"""An app that another process can import."""

from __future__ import annotations

from datetime import timedelta

from perdure import App, sleep, step

app = App("importable")


@step
async def charge(order_id: int) -> str:
    return f"payment-{order_id}"


@step(idempotent=True)
def send_receipt(payment: str) -> None: ...


@app.workflow
async def checkout(order_id: int) -> str:
    payment = await charge(order_id)
    await sleep(timedelta(days=1))
    await send_receipt(payment)
    return payment


@step
async def announce() -> None:
    print('{"an object": "of somebody else"}', end="")


@app.workflow
async def announced() -> str:
    await announce()
    return "done"
