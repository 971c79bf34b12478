"""The kit on the suite's own server."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from perdure.testing import TestBed, perdure_app


@pytest.fixture
def bed(database_url: str) -> Callable[..., TestBed]:
    return functools.partial(perdure_app, database_url=database_url)


@pytest.fixture
def ran() -> list[Any]:
    """What bodies note when they run."""
    return []
