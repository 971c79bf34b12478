"""The pytest plugin: the fixture `perdure_app`. It comes with perdure; nothing has to be configured.

It is a plain fixture that gives `perdure.testing.perdure_app`, so it works under pytest-asyncio, under anyio, and in
tests without any event loop.
"""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def perdure_app() -> Any:
    """`async with perdure_app(app) as kit` (or `with`, for blocking code): see `perdure.testing.perdure_app`."""
    from perdure.testing import perdure_app  # at first use: pytest loads this for every project

    return perdure_app
