"""Pauses between tries."""

from __future__ import annotations

import random
from collections.abc import Iterator


def backoff(first: float = 0.05, most: float = 2.0) -> Iterator[float]:
    """Pauses in seconds that double from `first` up to `most`, each shortened by chance by up to a half."""
    pause = first
    while True:
        yield pause * random.uniform(0.5, 1.0)
        pause = min(most, pause * 2)
