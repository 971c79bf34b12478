"""What an installation brings along: these packages and no others, under licences that a product may carry."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
LICENCES = re.compile(r"\b(Apache|BSD|ISC|MIT|PSF|Python Software Foundation|LGPL)", re.IGNORECASE)


def needed(package: str, extras: frozenset[str] = frozenset({""}), seen: set[str] | None = None) -> Iterator[str]:
    """The packages that this one needs, directly or not."""
    seen = set() if seen is None else seen
    for text in metadata.requires(package) or ():
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)
        if wanted and name not in seen:
            seen.add(name)
            yield name
            yield from needed(name, frozenset({"", *requirement.extras}), seen)


def test_what_is_installed_along_is_what_security_md_says() -> None:
    told = re.search(r"brings these packages: (.*?)\.\n", (ROOT / "SECURITY.md").read_text(), re.DOTALL)
    assert told is not None
    assert set(re.findall(r"`([a-z-]+)`", told[1])) == set(needed("perdure"))


def test_all_of_it_may_be_used_in_a_product() -> None:
    for package in needed("perdure"):
        about = metadata.metadata(package)
        classified = [each for each in about.get_all("Classifier") or () if each.startswith("License ::")]
        licences = [about.get("License-Expression") or "", about.get("License") or "", *classified]
        assert any(map(LICENCES.search, licences)), f"{package}: {licences}"
