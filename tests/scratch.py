"""Where the servers of tests keep their files: in memory, if there is enough of it.

Each test has a schema of its own, which has eighty files, and there are thousands of tests: on a disk, to make and to
remove files is half of what the suite does. Tests of what a crash leaves kill processes, not the machine, so they find
the same there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

MEMORY = Path("/dev/shm")
ENOUGH = 8 << 30
"""In bytes. The suite takes about two of these eight GiB."""
_PREFIX = "perdure-tests-"


def claim() -> Path | None:
    """A folder there for the temporary files of this process and of those that it starts; None: there is none.

    What others that were killed have left goes.
    """
    if "TMPDIR" in os.environ or not os.access(MEMORY, os.W_OK):
        return None
    for left in MEMORY.glob(f"{_PREFIX}*"):
        if not Path(f"/proc/{left.name.removeprefix(_PREFIX)}").exists():
            shutil.rmtree(left, ignore_errors=True)
    if shutil.disk_usage(MEMORY).free < ENOUGH:
        return None
    folder = MEMORY / f"{_PREFIX}{os.getpid()}"
    folder.mkdir()
    folder.chmod(0o1777)  # as /tmp: root's servers run as somebody else
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None
    return folder


def release(folder: Path) -> None:
    """Give it back."""
    shutil.rmtree(folder, ignore_errors=True)
