"""Locks between processes: flocks, which the kernel drops when their holder dies, however it dies.

A flock belongs to an *open file*, not to a process: a forked child shares its parent's. Three rules follow.

- What counts users is given up by closing, never by unlocking: unlocking would take it from the forked children too.
- What guards a section is unlocked before it is closed: a child forked meanwhile would otherwise hold it for ever.
- Who asks "does anybody else hold it?" opens the file anew: on the shared open file the answer would always be no.

Descriptors are closed on exec, so programs that are merely run take no part. The lock files are never deleted: two
processes could then hold "the" lock, one on the deleted file and one on the new.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from perdure.errors import ConfigurationError

SHARED = fcntl.LOCK_SH
EXCLUSIVE = fcntl.LOCK_EX

_PAUSE = 0.01
_sections: set[int] = set()


def attempt(path: Path, kind: int) -> int | None:
    """Takes the lock at once, on a new open file; gives its descriptor, or None when another holder is in the way."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_held(path: Path) -> bool:
    """Whether anybody holds the lock exclusively."""
    if not path.exists():
        return False
    descriptor = attempt(path, SHARED)
    if descriptor is None:
        return True
    os.close(descriptor)
    return False


def take(path: Path, kind: int, limit: float) -> int:
    """Takes the lock, waiting up to `limit` seconds for others.

    Raises:
        ConfigurationError: Somebody has held it for all that time.
    """
    # A blocking flock in a thread can't be interrupted, nor given up; a look every 10 ms can.
    deadline = time.monotonic() + limit
    while (descriptor := attempt(path, kind)) is None:
        if time.monotonic() > deadline:
            raise ConfigurationError(
                f"another process has held {str(path)!r} for {limit:.0f} s; end it if it hangs (`fuser` finds it)"
            )
        time.sleep(_PAUSE)
    return descriptor


@contextmanager
def section(path: Path, limit: float) -> Generator[None]:
    """Runs the body while no other process runs one under the same file."""
    descriptor = take(path, EXCLUSIVE, limit)
    _sections.add(descriptor)
    try:
        yield
    finally:
        _sections.discard(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _leave_sections_to_the_parent() -> None:
    # Closing drops only the child's copy; the parent's thread is still in there.
    for descriptor in _sections:
        os.close(descriptor)
    _sections.clear()


os.register_at_fork(after_in_child=_leave_sections_to_the_parent)
