"""A primary and its synchronous standby, and what makes the standby the primary."""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from perdure.embedded import Cluster
from perdure.embedded.account import account_for

_SETTINGS = {"fsync": "off", "listen_addresses": "127.0.0.1", "wal_level": "replica", "hot_standby": "on"}
_PATIENCE_SECONDS = 30.0


class Pair:
    """Two servers, of which one follows the other; a commit is acknowledged when both have it."""

    def __init__(self, primary: Cluster, standby: Cluster) -> None:
        self.primary = primary
        self.standby = standby

    @property
    def url(self) -> str:
        """Whichever of them takes writes."""
        hosts = ",".join(f"127.0.0.1:{cluster.port}" for cluster in (self.primary, self.standby))
        return f"postgresql://perdure@{hosts}/perdure?target_session_attrs=read-write&connect_timeout=3"

    def follow(self) -> None:
        """Make the standby out of the primary's data, and let commits wait for it."""
        self.primary.start(keep=False)
        self.primary.stop()
        subprocess.run(["cp", "-a", self.primary.directory / "data", self.standby.directory / "data"], check=True)
        data = self.standby.directory / "data"
        (data / "standby.signal").touch()
        account_for(data).own(data / "standby.signal")
        self.primary.start(keep=False)
        self.standby.start(keep=False)
        with psycopg.connect(self.primary.url, autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            connection.execute("SELECT pg_reload_conf()")
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while connection.execute("SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'").fetchone() is None:
                assert time.monotonic() < deadline, "the standby doesn't follow"
                time.sleep(0.02)

    def promote(self) -> None:
        """The standby takes the place of the primary, which is dead for good."""
        with psycopg.connect(self.standby.url, autocommit=True) as connection:
            connection.execute("SELECT pg_promote()")


@contextmanager
def pair() -> Generator[Pair]:
    """Both, running, one following the other; gone afterwards."""
    primary_port, standby_port = spare_ports(2)
    primary = Cluster(Path(tempfile.mkdtemp(prefix="perdure-")), settings={**_SETTINGS, "port": str(primary_port)})
    follows = f"host=127.0.0.1 port={primary_port} user=perdure application_name=standby"
    standby = Cluster(
        Path(tempfile.mkdtemp(prefix="perdure-")),
        settings={**_SETTINGS, "port": str(standby_port), "primary_conninfo": follows},
    )
    both = Pair(primary, standby)
    try:
        both.follow()
        yield both
    finally:
        standby.destroy()
        primary.destroy()


def spare_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
