"""What happened in a seed, and what all its parts go by."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from perdure import telemetry

LEASE = 2.0
EPOCH_SECONDS = 1_900_000_000
"""Where the virtual time begins, for the database."""


@dataclass
class Seen:
    """What happened in a seed: for the coverage of named points, and for whoever looks for the cause of a failure."""

    statements: list[tuple[float, str, str, Any, Any]] = field(default_factory=list)
    """(time, process, statement, parameters, rows or error)"""
    events: list[tuple[float, str, telemetry.Event]] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    workflows: int = 0
    runs: int = 0
    seconds: float = 0.0

    def digest(self) -> str:
        """The same for the same course of events."""
        text = "\n".join(f"{at:.6f} {who} {name}" for at, who, name, _, _ in self.statements)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
