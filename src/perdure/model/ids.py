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
    return UUID(int=_number(noise, noise >> 68 if key is None else slot_of_key(key)))


def new_ids(count: int) -> list[UUID]:
    """So many new ids, lowest first."""
    noise = os.urandom(10 * count)
    noises = [int.from_bytes(noise[at : at + 10], "big") for at in range(0, len(noise), 10)]
    return [UUID(int=number) for number in sorted(_number(each, each >> 68) for each in noises)]


def _number(noise: int, slot: int) -> int:
    milliseconds = time.time_ns() // 1_000_000
    return milliseconds << 80 | 0x7 << 76 | slot << 64 | 0b10 << 62 | noise & _RANDOM_BITS


def first_id(at: datetime | None) -> UUID:
    """An id that is lower than all that were made at that time or later; None: than all."""
    return UUID(int=0) if at is None else UUID(int=int(at.timestamp() * 1000) << 80)


def slot_of_key(key: str) -> int:
    """The slot (0 to 4095) of a key: stable, on every machine."""
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=2).digest(), "big") & 0xFFF


def slot_of(id: UUID) -> int:
    """The slot (0 to 4095) of an id."""
    return (id.int >> 64) & 0xFFF
