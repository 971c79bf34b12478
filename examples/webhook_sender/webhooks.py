"""Webhooks: signed, sent again until the endpoint takes them, and parked for an operator if it never does."""

from __future__ import annotations

import hashlib
import hmac
import json
import urllib.error
import urllib.request
from datetime import timedelta
from typing import Any

from perdure import App, Retry, RetryAfter, current

app = App("webhooks")

SECRET = b"a secret of the customer's"


class Rejected(Exception):
    """The endpoint doesn't want it, and won't: there is no use in trying again."""


def signature(body: bytes) -> str:
    """What a receiver compares, so that nobody else can send it anything."""
    return hmac.new(SECRET, body, hashlib.sha256).hexdigest()


# A plain function: it runs in a thread, so a blocking HTTP client is fine.
@app.job(retry=Retry(max_attempts=8, initial=timedelta(seconds=10), give_up_on=(Rejected,)), on_exhausted="park")
def deliver(url: str, event: dict[str, Any]) -> int:
    """Send one event. A receiver sees the same `Idempotency-Key` each time, and can leave out what it has."""
    body = json.dumps(event).encode()
    headers = {
        "Content-Type": "application/json",
        "Idempotency-Key": current().idempotency_key,
        "X-Signature": signature(body),
    }
    request = urllib.request.Request(url, data=body, headers=headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            if error.code in (429, 503) and (seconds := error.headers.get("Retry-After", "")).isdigit():
                raise RetryAfter(timedelta(seconds=int(seconds))) from None  # it knows best
            if error.code in (400, 401, 403, 404, 410):
                raise Rejected(f"{url} answers {error.code}") from None
            raise ConnectionError(f"{url} answers {error.code}") from None


def announce(url: str, event: dict[str, Any]) -> None:
    """Called by the rest of the application; the event's id makes it one delivery, however often it is called."""
    app.blocking.start(deliver(url, event), key=f"{event['id']} {url}")
