"""A client for the time of a command."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from perdure.cli.options import settings
from perdure.client import Client

T = TypeVar("T")


def with_client(use: Callable[[Client], Coroutine[Any, Any, T]], **changes: Any) -> T:
    """Use a client of the database that the options name, and close it; `changes` are settings."""
    client = Client()
    client.settings = settings(**changes)

    async def main() -> T:
        async with client:
            return await use(client)

    return asyncio.run(main())
