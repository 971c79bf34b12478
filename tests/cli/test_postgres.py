"""`perdure postgres`, on a real server."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner, Result

from perdure.cli.postgres import postgres
from perdure.embedded import locate
from perdure.errors import ConfigurationError


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    """A base directory that every user can pass through, for all tests: making a server's data takes its time."""
    folder = Path(tempfile.mkdtemp(prefix="perdure-test-")).resolve()
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def project(base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder is a project, and its server isn't running, before and after."""
    (base / "shop" / ".git").mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(base / "shop")
    monkeypatch.setenv("PERDURE_EMBEDDED_DIR", str(base))
    for name in ("PERDURE_EMBEDDED", "KUBERNETES_SERVICE_HOST", "PERDURE_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    yield base / "shop"
    locate(base / "shop").stop()


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(postgres, arguments)


def test_start_keeps_it_running_until_stop() -> None:
    started = invoke("start")
    assert started.exit_code == 0, started.output
    assert "running, kept until `perdure postgres stop`: PostgreSQL 18." in started.stdout
    with psycopg.connect(locate().url) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)

    stopped = invoke("stop")
    assert (stopped.exit_code, stopped.stdout) == (0, f"stopped: {locate().directory}\n")
    assert not locate().status().running


def test_start_twice_and_stop_twice_do_no_harm() -> None:
    assert invoke("start").exit_code == invoke("start").exit_code == 0
    assert invoke("stop").exit_code == 0
    again = invoke("stop")
    assert (again.exit_code, again.stdout) == (0, f"was not running: {locate().directory}\n")


def test_status_tells_people_and_exit_codes_tell_scripts() -> None:
    before = invoke("status")
    assert (before.exit_code, before.stdout) == (3, f"not running: {locate().directory}\n")
    locate().acquire()
    during = invoke("status")
    assert during.exit_code == 0
    assert during.stdout.startswith("running, until its last user leaves: PostgreSQL 18.")
    assert "0 clients" in during.stdout
    locate().release()
    assert invoke("status").exit_code == 3


def test_status_as_json_has_all_of_it() -> None:
    before = invoke("status", "--json")
    assert before.exit_code == 3
    assert json.loads(before.stdout)["running"] is False
    invoke("start")
    during = json.loads(invoke("status", "--json").stdout)
    assert during == {
        "running": True,
        "kept": True,
        "directory": str(locate().directory),
        "url": locate().url,
        "version": during["version"],
        "pid": locate().status().pid,
        "connections": 0,
    }
    assert during["version"].startswith("18.")


def test_status_counts_clients_and_not_what_perdure_asks_of_its_own_accord() -> None:
    url = locate().acquire()
    try:
        with psycopg.connect(url, dbname="postgres", application_name="perdure postgres"):
            assert locate().status().connections == 0
            with psycopg.connect(url):
                assert locate().status().connections == 1
    finally:
        locate().release()


def test_url_prints_nothing_but_the_url() -> None:
    started = invoke("url", "--start")
    assert (started.exit_code, started.stdout) == (0, locate().url + "\n")
    assert invoke("url").stdout == started.stdout
    assert locate().status().kept


def test_url_starts_nothing_of_itself_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "new"  # the socket's path has the project's name in it, and must be short
    project.mkdir()
    monkeypatch.chdir(project)
    printed = invoke("url")
    assert (printed.exit_code, printed.stdout) == (3, locate().url + "\n")
    assert "perdure postgres start" in printed.stderr
    assert not locate().directory.exists()


def test_psql_hands_its_arguments_on_and_stops_what_it_started(capfd: pytest.CaptureFixture[str]) -> None:
    ran = invoke("psql", "-X", "-At", "-c", "SELECT 'from ' || current_database()")
    assert ran.exit_code == 0, ran.output
    assert capfd.readouterr().out == "from perdure\n"
    assert not locate().status().running


def test_psql_hands_its_exit_code_back(capfd: pytest.CaptureFixture[str]) -> None:
    assert invoke("psql", "-X", "-v", "ON_ERROR_STOP=1", "-f", "/nowhere/to/be/found.sql").exit_code != 0
    assert "found.sql" in capfd.readouterr().err


def test_psql_leaves_running_what_was_started(capfd: pytest.CaptureFixture[str]) -> None:
    invoke("start")
    assert invoke("psql", "-X", "-c", "SELECT 1").exit_code == 0
    assert locate().status().running


def test_start_says_when_the_server_isnt_the_one_that_perdure_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERDURE_DATABASE_URL", "postgresql://db.example.org/shop")
    assert "PERDURE_DATABASE_URL is set" in invoke("start").stderr


def test_what_cant_run_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch, project: Path) -> None:
    (project / "file").touch()
    with monkeypatch.context() as patched:
        patched.setenv("PERDURE_EMBEDDED_DIR", str(project / "file"))
        failed = invoke("start")
    assert isinstance(failed.exception, ConfigurationError)


@pytest.mark.parametrize("command", ["start", "stop", "status", "url", "psql"])
def test_every_command_shows_an_example(command: str) -> None:
    shown = invoke(command, "--help")
    assert shown.exit_code == 0
    assert f"  perdure postgres {command}" in shown.stdout or f"$(perdure postgres {command}" in shown.stdout
