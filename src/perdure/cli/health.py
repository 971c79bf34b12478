"""Two questions over HTTP: `/live` (the process answers) and `/ready` (it holds its lease, and claims).

`/live` depends on nothing: a database that is away is no reason to kill a worker, which waits for it. `/ready` is 200
or 503. A thread answers, so a step that blocks the event loop doesn't make the worker look dead.
"""

from __future__ import annotations

import http.server
import socket
import socketserver
import threading
from collections.abc import Callable
from typing import cast

from perdure.cli.endings import MISCONFIGURED, Failure
from perdure.cli.options import Address

_SECONDS = 5.0


class Health:
    """Answers from its making until the process ends.

    Raises:
        Failure: It can't listen there.
    """

    def __init__(self, address: Address, is_ready: Callable[[], bool]) -> None:
        try:
            self._server = _Server(address, is_ready)
        except (OSError, UnicodeError) as error:
            raise Failure(f"can't listen on {address}: {error}; use another --health", MISCONFIGURED) from error
        threading.Thread(target=self._server.serve_forever, name="perdure-health", daemon=True).start()

    @property
    def address(self) -> Address:
        """Where it listens."""
        host, port, *_ = self._server.server_address
        return Address(str(host), int(port))


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: Address, is_ready: Callable[[], bool]) -> None:
        family, *_, found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = family
        self.is_ready = is_ready
        super().__init__((str(found[0]), int(found[1])), _Answer)

    def handle_error(self, request: object, client_address: object) -> None:
        """Whoever asked has gone."""


class _Answer(http.server.BaseHTTPRequestHandler):
    timeout = _SECONDS

    def do_GET(self) -> None:
        match self.path.partition("?")[0]:
            case "/live":
                self._answer(200, "live")
            case "/ready":
                ready = cast("_Server", self.server).is_ready()
                self._answer(200 if ready else 503, "ready" if ready else "not ready")
            case _:
                self._answer(404, "there are /live and /ready")

    do_HEAD = do_GET  # noqa: N815 - http.server looks for it

    def _answer(self, status: int, text: str) -> None:
        body = f"{text}\n".encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Probes come every few seconds; they aren't worth a line."""
