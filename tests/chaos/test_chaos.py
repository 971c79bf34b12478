"""A small dose of chaos; `make chaos` takes as much as one likes."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from perdure import embedded

from .storm import Storm


@pytest.mark.timeout(300)
async def test_the_books_balance_after_half_a_minute_of_chaos(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as spare:
        port = spare.getsockname()[1]
    with embedded.temporary({"listen_addresses": "127.0.0.1", "port": str(port)}) as cluster:
        report = await Storm(cluster, seconds=30, seed=1, folder=tmp_path).run()
    assert report.wrong == []
    assert report.acknowledged > 20
    assert len(report.faults) >= 3
