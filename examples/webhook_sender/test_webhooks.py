"""Deliveries to an endpoint that plays the customer: a real HTTP server on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from perdure import Status
from webhooks import app, deliver, signature


class Endpoint:
    """Answers with what the test says, in turn, then with 200; keeps what it was sent."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.got: list[tuple[dict[str, str], bytes]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.got.append((dict(self.headers), body))
                status, headers = outer.answers.pop(0) if outer.answers else (200, {})
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *args: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    thread = threading.Thread(target=endpoint.server.serve_forever)
    thread.start()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()
    thread.join()


async def test_an_event_arrives_signed(perdure_app: Any, endpoint: Endpoint) -> None:
    async with perdure_app(app) as kit:
        assert await kit.run(deliver(endpoint.url, {"id": 1, "type": "paid"})) == 200
    ((headers, body),) = endpoint.got
    assert json.loads(body) == {"id": 1, "type": "paid"}
    assert headers["X-Signature"] == signature(body)


async def test_it_is_sent_again_under_the_same_key_until_it_is_taken(perdure_app: Any, endpoint: Endpoint) -> None:
    endpoint.answers = [(500, {}), (503, {"Retry-After": "3600"})]
    async with perdure_app(app) as kit:
        before = await kit.clock.now()
        assert await kit.run(deliver(endpoint.url, {"id": 2})) == 200
        assert (await kit.clock.now() - before).total_seconds() >= 3600, "the endpoint said when"
    assert len({headers["Idempotency-Key"] for headers, _ in endpoint.got}) == 1
    assert len(endpoint.got) == 3


async def test_what_is_never_taken_waits_for_an_operator_who_resumes_it(perdure_app: Any, endpoint: Endpoint) -> None:
    endpoint.answers = [(500, {})] * 8
    async with perdure_app(app) as kit:
        handle = await app.start(deliver(endpoint.url, {"id": 3}))
        with pytest.raises(TimeoutError):
            await kit.finish(handle)
        info = await handle.describe()
        assert (info.status, info.waiting_for, len(endpoint.got)) == (Status.WAITING, "operator", 8)
        await handle.resume()
        assert await kit.finish(handle) == 200


async def test_an_endpoint_that_is_gone_is_not_asked_again(perdure_app: Any, endpoint: Endpoint) -> None:
    endpoint.answers = [(410, {})]
    async with perdure_app(app) as kit:
        handle = await app.start(deliver(endpoint.url, {"id": 4}))
        await kit.idle()
        assert (await handle.describe()).waiting_for == "operator"
    assert len(endpoint.got) == 1


async def test_no_event_is_lost_wherever_it_crashes(perdure_app: Any, endpoint: Endpoint) -> None:
    async with perdure_app(app) as kit:
        report = await kit.crash_everywhere(deliver(endpoint.url, {"id": 5}))
        runs = [each async for each in app.workflows()]
    keys = {headers["Idempotency-Key"] for headers, _ in endpoint.got}
    assert len(keys) == len(runs), "each run was delivered, under one key"
    assert report.reran == ("deliver",), "so receivers get some twice, and leave them out by the key"
