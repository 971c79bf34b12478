"""PgBouncer between perdure and the suite's server: in transaction mode, with few connections behind it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

_PORT = "6432"


@contextmanager
def pooler(url: str) -> Generator[str]:
    """The URL that leads to that server through a PgBouncer, which is gone afterwards."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if program is None:
        raise RuntimeError("pgbouncer is missing; on Debian: apt-get install pgbouncer")
    server = conninfo_to_dict(url)
    with tempfile.TemporaryDirectory(prefix="pgbouncer-") as folder:
        configuration = Path(folder, "pgbouncer.ini")
        configuration.write_text(
            f"""\
[databases]
* = host={server["host"]} port={server["port"]} user={server["user"]}

[pgbouncer]
listen_port = {_PORT}
unix_socket_dir = {folder}
auth_type = any
pool_mode = transaction
default_pool_size = 20
max_client_conn = 2000
logfile = {folder}/log
"""
        )
        command = [program, str(configuration)]
        if os.geteuid() == 0:  # it refuses to be root; the server's socket is open to the user that it runs as
            owner = os.stat(str(server["host"]))
            os.chown(folder, owner.st_uid, owner.st_gid)
            process = subprocess.Popen(command, user=owner.st_uid, group=owner.st_gid, extra_groups=[])
        else:
            process = subprocess.Popen(command)
        try:
            through = make_conninfo(url, host=folder, port=_PORT)
            _wait(process, through, Path(folder, "log"))
            yield through
        finally:
            process.terminate()
            process.wait(10)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            with psycopg.connect(url, autocommit=True, prepare_threshold=None) as connection:
                connection.execute("SELECT 1")
                return
        except psycopg.OperationalError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                said = log.read_text() if log.exists() else ""
                raise RuntimeError(f"pgbouncer doesn't answer: {error}; it says: {said[-2000:]}") from error
        time.sleep(0.02)
