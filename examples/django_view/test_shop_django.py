"""The project, in a process of its own, because Django's settings are one for each process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4


async def test_an_order_and_its_workflow_are_there_together_or_not_at_all(perdure_app: Any) -> None:
    from perdure import App

    async with perdure_app(App("nothing")) as kit:  # for its server
        env = os.environ | {
            "PERDURE_DATABASE_URL": kit.database_url,
            "PERDURE_SCHEMA": kit.schema + "_shop",
            "SHOP_TABLE": f"shop_{uuid4().hex}",
        }
        command = [sys.executable, "try_it.py"]
        done = subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines == [
        "placed: 200",
        "refused: 500",
        "orders: ['book']",
        "workflow: parcel with book",
        "parcels: ['parcel with book']",
        "shown: {'status': 'success'}",
    ]
