"""An option that wasn't given, where None means something."""

from __future__ import annotations


class Unset:
    """Stands for an option that wasn't given."""

    def __repr__(self) -> str:
        return "..."


UNSET = Unset()
