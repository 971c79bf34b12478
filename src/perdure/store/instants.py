"""Times as the database has them: some are no `datetime`, which ends with the year 9999 and knows no infinity.

Whoever may write to the tables may leave such a time there. The driver would raise an error for all rows of an answer,
and a worker that claims them would claim in vain, again and again. So they are read as the first or last `datetime`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, cast

import psycopg
from psycopg.abc import AdaptContext, Buffer
from psycopg.adapt import AdaptersMap, Loader
from psycopg.pq import Format

_OID = 1184
_SIGN = 0x80
_DRIVERS = cast("type[Loader]", psycopg.adapters.get_loader(_OID, Format.BINARY))  # in C, where there is one
FIRST, LAST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


class InstantLoader(Loader):
    """Reads `timestamptz`."""

    format = Format.BINARY

    def __init__(self, oid: int, context: AdaptContext | None = None) -> None:
        super().__init__(oid, context)
        self._load = _DRIVERS(oid, context).load

    def load(self, data: Buffer) -> Any:
        try:
            return self._load(data)
        except psycopg.DataError:
            return FIRST if bytes(data)[0] & _SIGN else LAST


def register(adapters: AdaptersMap) -> None:
    """Teach a connection these times."""
    adapters.register_loader("timestamptz", InstantLoader)
