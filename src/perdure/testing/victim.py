"""A worker process that kills itself on order: `python -m perdure.testing.victim ORDER` (see crashes.py)."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from datetime import timedelta
from typing import Any
from uuid import UUID

from perdure.app import App
from perdure.testing.crashes import victim_boundaries
from perdure.testing.kit import Kit


async def _run(order: dict[str, Any]) -> None:
    with victim_boundaries(
        None if order["at"] is None else tuple(order["at"])
    ):  # also around the import, which may print something
        app: App = getattr(importlib.import_module(order["module"]), order["app"])
        kit = Kit(
            app,
            database_url=order["database_url"],
            schema=order["schema"],
            concurrency=100,
            lease=timedelta(seconds=order["lease"]),
        )
        async with kit:
            try:
                await kit.finish(app.handle(UUID(order["workflow_id"])))
            except Exception:
                pass  # how it ended stands in the database


if __name__ == "__main__":
    asyncio.run(_run(json.loads(sys.argv[1])))
