"""The PostgreSQL that starts itself: what perdure runs on where no database is set.

A real server with durable settings, from the extra `perdure[embedded]`; one per user and project, shared by all
processes of the project (`cluster` has the protocol), reachable through a socket in a folder that is closed to others.

    places     where it lives            account    whom it runs as            binaries   what is run
    locks      who may do what           server     one server over a folder   cluster    the sharing of it
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from perdure.embedded import binaries, places
from perdure.embedded.cluster import DATABASE, Cluster, Status
from perdure.embedded.server import ROLE, StopMode
from perdure.errors import ConfigurationError

__all__ = ["DATABASE", "ROLE", "Cluster", "Status", "StopMode", "embedded_url", "locate", "psql_path", "temporary"]

_ON = ("on", "1", "true", "yes")
_OFF = ("off", "0", "false", "no")

_located: dict[Path, Cluster] = {}
_announced: set[Path] = set()


def locate(project: Path | None = None) -> Cluster:
    """The cluster of a project: the nearest parent folder with `pyproject.toml` or `.git`, else the folder itself.

    The same project gives the same object, so `acquire` and `release` may be in different places. Starts nothing.

    Args:
        project: A folder in the project; the current one if not given.
    """
    directory = places.cluster_directory(places.project_folder(project)).resolve()
    return _located.setdefault(directory, Cluster(directory))


def embedded_url() -> str:
    """The URL of the project's own database, which is up and stays up while this process lives.

    It says so on stderr, once per process.

    Raises:
        ConfigurationError: There is to be no embedded server here, or it can't run; says what to set.
    """
    _check_wanted()
    programs = binaries.find()
    cluster = locate()
    url = cluster.acquire()
    if cluster.directory not in _announced:
        _announced.add(cluster.directory)
        print(
            f"perdure: using the embedded PostgreSQL {programs.version} at {cluster.directory} "
            "(set PERDURE_DATABASE_URL to use your own)",
            file=sys.stderr,
        )
    return url


@contextmanager
def temporary(settings: Mapping[str, str] | None = None) -> Generator[Cluster]:
    """A running cluster with nothing in it, which is gone afterwards: for tests.

    Args:
        settings: Settings of PostgreSQL. `fsync` is off, unless they turn it on.
    """
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="perdure-")), settings={"fsync": "off", **(settings or {})})
    try:
        cluster.start(keep=False)
        yield cluster
    finally:
        cluster.destroy()


def psql_path() -> Path:
    """Where the `psql` is that belongs to the embedded server.

    Raises:
        ConfigurationError: The extra isn't installed.
    """
    return binaries.find().path("psql")


def _check_wanted() -> None:
    wish = os.environ.get("PERDURE_EMBEDDED", "").lower()
    if wish in _OFF:
        raise ConfigurationError(
            "no database is set, and PERDURE_EMBEDDED turns the embedded one off; set PERDURE_DATABASE_URL=postgresql://..."
        )
    if wish and wish not in _ON:
        raise ConfigurationError(f"PERDURE_EMBEDDED is {wish!r}; set it to 'on' or 'off'")
    # A pod's disk goes with the pod: nobody shall get an ephemeral database by forgetting a variable.
    if not wish and "KUBERNETES_SERVICE_HOST" in os.environ:
        raise ConfigurationError(
            "no database is set, and in Kubernetes perdure doesn't start one of its own; set "
            "PERDURE_DATABASE_URL=postgresql://... (or PERDURE_EMBEDDED=on, if its data may go when the pod goes)"
        )
