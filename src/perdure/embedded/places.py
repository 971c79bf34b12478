"""Where an embedded server lives: one folder per user and project, and a socket folder with a short enough name."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
import tempfile
from pathlib import Path

from perdure.embedded.account import Account
from perdure.errors import ConfigurationError

# The address of a Unix socket has 104 bytes on macOS and 108 on Linux, with a NUL and "/.s.PGSQL.65535" in it.
_LONGEST_SOCKET_FOLDER = 104 - 1 - len("/.s.PGSQL.65535")

# libpq takes a comma for the start of another host, and the server's own list of folders has quotes and commas.
_AWKWARD = re.compile(r"""[,"'\\\x00-\x1f]""")

_PROJECT_MARKERS = ("pyproject.toml", ".git")


def project_folder(start: Path | None = None) -> Path:
    """The nearest folder upwards that holds `pyproject.toml` or `.git`, else the one it started from."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if any((folder / marker).exists() for marker in _PROJECT_MARKERS):
            return folder
    return here


def base_directory() -> Path:
    """Where the servers of all projects of this user live: `PERDURE_EMBEDDED_DIR`, else as the platform does it."""
    if chosen := os.environ.get("PERDURE_EMBEDDED_DIR"):
        return Path(chosen).expanduser().absolute()
    if os.geteuid() == 0:
        return _base_of_root()
    try:
        home = Path.home()
    except RuntimeError:
        raise ConfigurationError(
            "this user has no home directory to keep an embedded PostgreSQL in; set PERDURE_EMBEDDED_DIR to a folder"
        ) from None
    if sys.platform == "darwin":
        return home / "Library" / "Application Support" / "perdure"
    data_home = Path(os.environ.get("XDG_DATA_HOME") or "")
    return (data_home if data_home.is_absolute() else home / ".local" / "share") / "perdure"


def cluster_directory(project: Path) -> Path:
    """The folder of the project's server: readable (the project's name) and unique (a hash of its path)."""
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", project.name).strip("-.")[:32] or "project"
    digest = hashlib.sha256(os.fsencode(project)).hexdigest()[:8]
    return base_directory() / f"{name}-{digest}"


def prepare_directory(directory: Path, account: Account) -> None:
    """Makes the folder of a server, which nobody but the owner may look into.

    The server of root is another user's process: it may pass through, but not look around.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if account.switches and not account.may(directory, 1):
        directory.chmod(stat.S_IMODE(directory.stat().st_mode) | 0o011)
    account.check_reaches(directory)


def socket_folder(directory: Path) -> Path:
    """The folder of the server's socket, as it was chosen when the server first started.

    It is `socket` in the server's folder. Where that is too long, it is a symbolic link, which keeps the choice for all
    processes: XDG_RUNTIME_DIR and TMPDIR may differ among them.
    """
    link = directory / "socket"
    return Path(os.readlink(link)) if link.is_symlink() else link


def is_private(folder: Path, account: Account) -> bool:
    """Whether the folder exists, belongs to the server's user, and shuts out everybody else."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == account.uid and stat.S_IMODE(found.st_mode) & 0o077 == 0


def prepare_socket_folder(directory: Path, account: Account) -> Path:
    """Makes the folder of the socket, and clears it of what a dead server left. No server may be running."""
    link = directory / "socket"
    if link.is_symlink() or not fits(link):
        folder = _short_folder(link, account)
    else:
        folder = link
        folder.mkdir(mode=0o700, exist_ok=True)
        account.own(folder)
        folder.chmod(0o700)
    for left_over in folder.glob(".s.PGSQL.*"):
        left_over.unlink(missing_ok=True)
    return folder


def fits(folder: Path) -> bool:
    """Whether a socket in the folder has a name that all of libpq, the server and the kernel take."""
    return len(os.fsencode(folder)) <= _LONGEST_SOCKET_FOLDER and not _AWKWARD.search(str(folder))


def _short_folder(link: Path, account: Account) -> Path:
    if link.is_symlink() and is_private(Path(os.readlink(link)), account):
        return Path(os.readlink(link))
    # A random name, made by mkdtemp: in a folder that all may write to, a name that others can guess can be squatted.
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    candidates = [runtime, tempfile.gettempdir(), "/tmp"]
    for parent in map(Path, candidates):
        if parent.is_absolute() and fits(parent / "perdure-12345678") and os.access(parent, os.W_OK | os.X_OK):
            if account.switches and not account.reaches(parent):
                continue
            folder = Path(tempfile.mkdtemp(prefix="perdure-", dir=parent))
            account.own(folder)
            fresh = link.with_name("socket.new")
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(folder)
            fresh.replace(link)
            return folder
    raise ConfigurationError(
        f"no socket can be in {str(link)!r} (too long, or a comma or quote in it), nor is there another folder for it; "
        "set XDG_RUNTIME_DIR or TMPDIR to a short path"
    )


def _base_of_root() -> Path:
    # Not below root's home: the server runs as another user, which must be able to reach it.
    choices = [Path("/var/lib/perdure"), Path(tempfile.gettempdir()) / "perdure-root"]
    for folder in choices:
        try:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            found = folder.lstat()
        except OSError:
            continue
        if stat.S_ISDIR(found.st_mode) and found.st_uid == 0 and not found.st_mode & 0o022:
            if stat.S_IMODE(found.st_mode) & 0o711 != 0o711:
                folder.chmod(0o755)  # a strict umask
            if os.access(folder, os.W_OK):
                return folder
    raise ConfigurationError(
        f"neither {str(choices[0])!r} nor {str(choices[1])!r} can be used for an embedded PostgreSQL; "
        "set PERDURE_EMBEDDED_DIR to a folder that every user can reach"
    )
