"""The run that the documentation tells of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PUBLISHED = Path(__file__).parent / "published.json"


@dataclass(frozen=True, slots=True)
class Told:
    """A published run, and how to get at its figures."""

    run: dict[str, Any]

    def median(self, measurement: str, name: str) -> float:
        """Of the figure with that name.

        Raises:
            KeyError: There is none.
        """
        return float(self._figure(measurement, name)["median"])

    def best(self, measurement: str, prefix: str) -> str:
        """The name of the fastest of those that begin so: which of its settings it was."""
        rates = [each for each in self.run["figures"][measurement] if each["unit"] == "workflows/s"]
        named = [each for each in rates if str(each["name"]).startswith(prefix)]
        return str(max(named, key=lambda each: each["median"])["name"])

    def _figure(self, measurement: str, name: str) -> dict[str, Any]:
        for figure in self.run["figures"][measurement]:
            if figure["name"] == name:
                return dict(figure)
        raise KeyError(f"{measurement}: no figure {name!r}")


def published() -> Told:
    """The run that the pages are made from."""
    return Told(json.loads(PUBLISHED.read_text(encoding="utf-8")))
