"""The manifest's numbers fit each other, and its very command does what the probes and the rolling update rely on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from perdure import App, Client, Invocation

HERE = Path(__file__).parent
DOCUMENTS = {each["kind"]: each for each in yaml.safe_load_all((HERE / "worker.yaml").read_text(encoding="utf-8"))}
POD = DOCUMENTS["Deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
OPTIONS = dict(part[2:].split("=") for part in CONTAINER["command"] if part.startswith("--"))


def test_the_pod_outlives_the_grace_period_and_probes_find_their_port() -> None:
    assert POD["terminationGracePeriodSeconds"] >= int(OPTIONS["grace"]) + 10
    (port,) = CONTAINER["ports"]
    assert OPTIONS["health"].endswith(f":{port['containerPort']}")
    for probe, path in (("startupProbe", "/live"), ("livenessProbe", "/live"), ("readinessProbe", "/ready")):
        assert CONTAINER[probe]["httpGet"] == {"path": path, "port": port["name"]}


def test_an_update_never_leaves_fewer_workers_and_all_use_one_secret() -> None:
    update = DOCUMENTS["Deployment"]["spec"]["strategy"]["rollingUpdate"]
    assert (update["maxSurge"], update["maxUnavailable"]) == (1, 0)
    (migration,) = DOCUMENTS["Job"]["spec"]["template"]["spec"]["containers"]
    assert migration["envFrom"] == CONTAINER["envFrom"]
    assert migration["image"] == CONTAINER["image"]
    assert "PERDURE_DATABASE_URL" in DOCUMENTS["Secret"]["stringData"]


def test_the_image_runs_the_worker_as_its_first_process() -> None:
    (line,) = re.findall(r"^CMD (.*)$", (HERE / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert line.startswith('["perdure", "worker", "shop:app"'), "no shell, which would keep SIGTERM to itself"


async def test_a_worker_that_is_replaced_hands_its_work_over(perdure_app: Any) -> None:
    async with perdure_app(App("nothing")) as kit, Client(kit.database_url, schema=f"{kit.schema}_shop") as client:
        env = os.environ | {"PERDURE_DATABASE_URL": kit.database_url, "PERDURE_SCHEMA": f"{kit.schema}_shop"}
        env.pop("KUBERNETES_SERVICE_HOST", None)
        handle = await client.start(Invocation("ship", 42))
        with worker(env) as old:
            health = line(old, r"health: (http://\S+)/live")
            line(old, "waiting")
            assert (get(f"{health}/live"), get(f"{health}/ready")) == (200, 200)
            with worker(env | {"VAN_SECONDS": "0"}) as new:
                line(new, "health:")
                old.send_signal(signal.SIGTERM)
                assert old.wait(30) == 0
                assert await handle.result() == "parcel 42"
                new.send_signal(signal.SIGTERM)
                assert new.wait(30) == 0
        assert [each.attempts for each in await handle.steps()] == [1, 1], "a hand-over is no failure"


@contextmanager
def worker(env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """The container's command, on a free port, and without the patience of production."""
    given = [part for part in CONTAINER["command"][1:] if not part.startswith(("--health", "--grace"))]
    perdure = str(Path(sys.executable).with_name("perdure"))
    command = [perdure, *given, "--health=127.0.0.1:0", "--grace=0"]
    with subprocess.Popen(command, cwd=HERE, env=env, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str], pattern: str) -> str:
    """The next line that fits; its group, if it has one."""
    assert process.stderr is not None
    for text in process.stderr:
        if found := re.search(pattern, text):
            return found[1] if found.groups() else found[0]
    raise AssertionError(f"it ended without saying {pattern!r}")


def get(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
