"""Two servers that Patroni looks after, with etcd as its memory: it makes the standby the primary by itself."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from chaos.pair import spare_ports
from perdure.embedded import binaries
from perdure.embedded.account import Account, account_for

_TTL_SECONDS = 20
_PATIENCE_SECONDS = 90.0
_TRUSTED = ("local all all", "host all all 127.0.0.1/32", "host replication all 127.0.0.1/32")
_PASSWORD = "of-a-test"


class Node:
    """One server and the Patroni that looks after it."""

    def __init__(self, name: str, folder: Path, account: Account, ports: tuple[int, int], etcd: int) -> None:
        self.name = name
        self.port, self._api = ports
        self._folder = folder
        self._account = account
        self._config = folder / f"{name}.yaml"
        self._config.write_text(yaml.safe_dump(self._settings(etcd)))
        account.own(self._config)
        self.process: subprocess.Popen[bytes] | None = None

    def _settings(self, etcd: int) -> dict[str, Any]:
        users = {"superuser": "perdure", "replication": "replicator", "rewind": "rewinder"}
        return {
            "scope": "perdure",
            "name": self.name,
            "restapi": {"listen": f"127.0.0.1:{self._api}", "connect_address": f"127.0.0.1:{self._api}"},
            "etcd3": {"hosts": [f"127.0.0.1:{etcd}"]},
            "bootstrap": {
                "dcs": {
                    "ttl": _TTL_SECONDS,
                    "loop_wait": 2,
                    "retry_timeout": 3,
                    "synchronous_mode": True,
                    "postgresql": {"use_pg_rewind": False, "parameters": {"fsync": "off"}},
                },
                "initdb": ["data-checksums", {"encoding": "UTF8"}, {"locale": "C"}],
            },
            "postgresql": {
                "listen": f"127.0.0.1:{self.port}",
                "connect_address": f"127.0.0.1:{self.port}",
                "data_dir": str(self._folder / self.name),
                "pgpass": str(self._folder / f"{self.name}.pgpass"),
                "bin_dir": str(binaries.usable_by(self._account).path("postgres").parent),
                "authentication": {kind: {"username": user, "password": _PASSWORD} for kind, user in users.items()},
                "parameters": {"unix_socket_directories": str(self._folder)},
                "pg_hba": [f"{who} trust" for who in _TRUSTED],
            },
        }

    def start(self) -> None:
        """Let Patroni begin to look after it."""
        with (self._folder / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*_as(self._account), sys.executable, "-m", "patroni", str(self._config)],
                cwd=self._folder,
                stdout=log,
                stderr=log,
            )

    @property
    def is_primary(self) -> bool:
        """Whether Patroni says that it is."""
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self._api}/primary", timeout=2) as answer:
            return bool(answer.status == 200)
        return False

    @property
    def is_synchronous(self) -> bool:
        """Whether commits wait for it."""
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self._api}/sync", timeout=2) as answer:
            return bool(answer.status == 200)
        return False

    def kill(self) -> None:
        """The machine is gone: Patroni and its server, at once."""
        pid_file = self._folder / self.name / "postmaster.pid"
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        with suppress(OSError):
            postmaster = int(pid_file.read_text().split()[0])
            os.kill(postmaster, signal.SIGKILL)

    def log(self) -> str:
        """The end of what it has said."""
        with suppress(OSError):
            return (self._folder / f"{self.name}.log").read_text()[-3000:]
        return ""


class Patroni:
    """Both nodes, and etcd."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes

    @property
    def url(self) -> str:
        """Whichever of them takes writes."""
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        return f"postgresql://perdure:{_PASSWORD}@{hosts}/postgres?target_session_attrs=read-write&connect_timeout=3"

    def wait(self) -> Node:
        """Wait until one is the primary, and the other one a synchronous standby; returns the primary."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            primaries = [node for node in self.nodes if node.is_primary]
            if primaries and any(node.is_synchronous for node in self.nodes):
                return primaries[0]
            assert time.monotonic() < deadline, "\n".join(node.log() for node in self.nodes)
            time.sleep(0.2)


def _as(account: Account) -> list[str]:
    """Before a command: run it as that user, who may still read where root may (this Python may be root's own)."""
    if not account.switches:
        return []
    ids = [f"--reuid={account.uid}", f"--regid={account.gid}", "--clear-groups"]
    return ["setpriv", *ids, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


@contextmanager
def patroni() -> Generator[Patroni]:
    """Two servers under Patroni, one following the other; gone afterwards."""
    etcd = shutil.which("etcd")
    assert etcd is not None, "etcd is missing (Debian: etcd-server)"
    folder = Path(tempfile.mkdtemp(prefix="perdure-"))
    account = account_for(folder / "none")
    folder.chmod(0o755)
    account.own(folder)
    client, peer, *ports = spare_ports(6)
    here, there = (f"http://127.0.0.1:{port}" for port in (client, peer))
    with (folder / "etcd.log").open("ab") as log:
        memory = subprocess.Popen(
            [
                etcd, "--data-dir", str(folder / "etcd"), "--listen-client-urls", here, "--advertise-client-urls", here,
                "--listen-peer-urls", there, "--initial-advertise-peer-urls", there,
                "--initial-cluster", f"default={there}", "--unsafe-no-fsync",
            ],
            stdout=log, stderr=log,
        )  # fmt: skip
    nodes = [Node(f"node{each}", folder, account, (ports[2 * each], ports[2 * each + 1]), client) for each in range(2)]
    try:
        for node in nodes:
            node.start()
        yield Patroni(nodes)
    finally:
        for node in nodes:
            node.kill()
        memory.kill()
        memory.wait(10)
        shutil.rmtree(folder, ignore_errors=True)
