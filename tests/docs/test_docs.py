"""What the documentation says is so: every block runs, every name is there, every link leads somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import perdure
import perdure.testing
from perdure.config import Settings

sys.path.insert(0, str(Path(__file__).parent))
import reference

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
WITH_CODE = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_the_code_on_a_page_runs(page: Path, tmp_path: Path, database_url: str, schema: str) -> None:
    files, program = code_of(page)
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    # Blocks of a page follow one another, as its reader types them; a schema of their own keeps pages apart.
    prologue = (
        "import functools, perdure, perdure.app, perdure.client, perdure.embedded\n"
        f"perdure.embedded.embedded_url = lambda: {database_url!r}\n"
        "for kind in (perdure.App, perdure.Client):\n"
        f"    kind.__init__.__kwdefaults__['schema'] = {schema!r}\n"
        "__name__ = 'page'\n"
    )
    (tmp_path / "page.py").write_text(prologue + program, encoding="utf-8")
    run([sys.executable, "-W", "error", "page.py"], tmp_path, database_url)
    if any(name.startswith("test_") for name in files):
        run([sys.executable, "-m", "pytest", "-q", "-W", "error"], tmp_path, database_url)


def code_of(page: Path) -> tuple[dict[str, str], str]:
    """What stands on a page: files, whose blocks begin with their names, and the rest as one program."""
    text = page.read_text(encoding="utf-8")
    blocks: list[str] = re.findall(r"^```(?:python|toml)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    files = {name[1]: block for block in blocks if (name := re.match(r"# (\w+\.(?:py|toml))\n", block))}
    return files, "\n".join(block for block in blocks if block not in files.values())


def run(command: list[str], folder: Path, database_url: str) -> None:
    """Run it there; it must end well."""
    env = {"PERDURE_DATABASE_URL": database_url, "PERDURE_TEST_DATABASE_URL": database_url, "PATH": ""}
    finished = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_links_on_a_page_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", reference.PAGES)
def test_a_reference_page_says_what_the_code_says(page: str) -> None:
    written = (reference.REFERENCE / page).read_text(encoding="utf-8")
    # In a process of its own: click remembers how a command was called first.
    command = [sys.executable, reference.__file__, "--print", page]
    said = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout.decode()
    assert written == said, "run `python tests/docs/reference.py`"


def test_every_public_name_is_documented() -> None:
    page = (reference.REFERENCE / "python.md").read_text(encoding="utf-8")
    assert [name for name in perdure.__all__ if f"### `{name}`" not in page] == []


def test_every_name_of_the_test_kit_is_documented() -> None:
    assert set(reference.TESTING) == set(perdure.testing.__all__)
    public = {name for name in vars(perdure.testing.Kit) if not name.startswith("_")}
    assert set(reference.TESTING["Kit"]) == public


def test_every_public_verb_is_documented() -> None:
    page = (reference.REFERENCE / "python.md").read_text(encoding="utf-8")
    internal = {
        "session",
        "catalogue",
        "codec",
        "version",
        "names",
        "workflow_functions",
        "encoded",
        "decoded",
        "settings",
        "move",
        "program",
        "sessions",
    }
    missing: list[str] = []
    for kind in (perdure.Client, perdure.App, perdure.Handle):
        for name, member in vars(kind).items():
            public = not name.startswith("_") and (callable(member) or isinstance(member, property))
            if public and name not in internal and f"`{kind.__name__}.{name}`" not in page:
                missing.append(f"{kind.__name__}.{name}")
    assert missing == []


def test_every_setting_is_documented() -> None:
    page = (reference.REFERENCE / "python.md").read_text(encoding="utf-8")
    assert [name for name in Settings.__dataclass_fields__ if f"- `{name}`:" not in page] == []


async def test_every_column_of_a_view_is_documented(app: perdure.App, sql: Callable[..., list[Any]]) -> None:
    await app.session().database.fetch("clock")
    page = (reference.REFERENCE / "views.md").read_text(encoding="utf-8")
    for view in ("workflows", "workflow_steps", "workers", "queues"):
        section = page.partition(f"## `{view}`")[2].partition("\n## ")[0]
        columns = sql(
            "SELECT column_name FROM information_schema.columns WHERE table_schema = %s AND table_name = %s",
            app.settings.schema,
            view,
        )
        assert columns
        assert [column for (column,) in columns if f"`{column}`" not in section] == [], view


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
