"""Ids of workflows and workers: UUIDv7, made by the client (RFC 9562, §5.7).

    48 bits milliseconds since 1970 | 4 version | 12 slot | 2 variant | 62 random

The slot says on which shard the workflow lives, so that a bare id can be routed: the hash of its key where it has one
(the same key, the same shard), else random. The order of ids is the order of their makers' clocks, not of commits.
"""

from __future__ import annotations

import os
import time
from datetime import datetime
from hashlib import blake2b
from uuid import UUID

_RANDOM_BITS = (1 << 62) - 1


def new_id(key: str | None = None) -> UUID:
    """A new id; two ids made with the same key have the same slot."""
    noise = int.from_bytes(os.urandom(10), "big")
    slot = noise >> 68 if key is None else slot_of_key(key)
    milliseconds = time.time_ns() // 1_000_000
    return UUID(int=milliseconds << 80 | 0x7 << 76 | slot << 64 | 0b10 << 62 | noise & _RANDOM_BITS)


def first_id(at: datetime | None) -> UUID:
    """An id that is lower than all that were made at that time or later; None: than all."""
    return UUID(int=0) if at is None else UUID(int=int(at.timestamp() * 1000) << 80)


def slot_of_key(key: str) -> int:
    """The slot (0 to 4095) of a key: stable, on every machine."""
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=2).digest(), "big") & 0xFFF


def slot_of(id: UUID) -> int:
    """The slot (0 to 4095) of an id."""
    return (id.int >> 64) & 0xFFF
