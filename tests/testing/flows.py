"""An app that another process can import."""

from __future__ import annotations

from datetime import timedelta

from perdure import App, Retry, current, recv, send, sleep, step, write_stream

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


@app.job
async def double(number: int) -> int:
    return 2 * number


@step(retry=Retry(max_attempts=2, initial=timedelta(milliseconds=1)))
async def speak() -> None:
    await write_stream("words", current().attempt)
    if current().attempt == 1:
        raise ConnectionError


@app.workflow
async def family() -> list[int]:
    """Children, a message and a stream."""
    behind = await app.start(double(1))
    await send(current().id, "numbers", await double(2))
    await speak()
    return [await behind.result(), await recv("numbers", type=int)]
