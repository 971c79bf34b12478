"""Whom the server runs as: this user, or `nobody` when this user is root, whom PostgreSQL refuses to serve."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from perdure.errors import ConfigurationError


class Switch(TypedDict, total=False):
    """Arguments to `subprocess` that make the program run as another user."""

    user: int
    group: int
    extra_groups: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A user of the operating system.

    Attributes:
        switches: The user isn't the one who runs this process, so programs must change to it.
    """

    uid: int
    gid: int
    switches: bool

    def switch(self) -> Switch:
        """What `subprocess` is to be told."""
        return {"user": self.uid, "group": self.gid, "extra_groups": []} if self.switches else {}

    def own(self, path: Path) -> None:
        """Gives the file or folder to the user."""
        if self.switches:
            os.chown(path, self.uid, self.gid, follow_symlinks=False)

    def may(self, path: Path, bits: int) -> bool:
        """Whether the mode of the file grants the user all of `bits` (4 read, 2 write, 1 pass or run)."""
        found = path.stat()
        shift = 6 if found.st_uid == self.uid else 3 if found.st_gid == self.gid else 0
        return (found.st_mode >> shift) & bits == bits

    def reaches(self, path: Path) -> bool:
        """Whether the user can pass through all folders down to the path, and through it if it is one."""
        folders = [path, *path.parents] if path.is_dir() else list(path.parents)
        return all(self.may(folder, 1) for folder in folders)

    def check_reaches(self, directory: Path) -> None:
        """Raises ConfigurationError unless the user can reach the folder."""
        if self.switches and not self.reaches(directory):
            raise ConfigurationError(
                f"root's embedded PostgreSQL runs as user {_name(self.uid)}, which can't reach {str(directory)!r}; "
                "set PERDURE_EMBEDDED_DIR, and PERDURE_EMBEDDED_BINARIES if you use it, to folders open to every user"
            )


def account_for(data: Path) -> Account:
    """The user that the server over this data folder must run as: the one who owns the data, if root asks."""
    if os.geteuid() != 0:
        return Account(uid=os.geteuid(), gid=os.getegid(), switches=False)
    try:
        owner = data.stat()
    except FileNotFoundError:
        pass
    else:
        if owner.st_uid != 0:
            return Account(uid=owner.st_uid, gid=owner.st_gid, switches=True)
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        raise ConfigurationError(
            "PostgreSQL refuses to run as root, and there is no user 'nobody' to run it as; "
            "set PERDURE_DATABASE_URL=postgresql://..., or don't run as root"
        ) from None
    return Account(uid=nobody.pw_uid, gid=nobody.pw_gid, switches=True)


def _name(uid: int) -> str:
    try:
        return repr(pwd.getpwuid(uid).pw_name)
    except KeyError:
        return str(uid)
