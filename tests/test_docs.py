"""Examples in the documents are executed, and links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from safelight.cli.main import app

HOME = Path(__file__).parents[1]
PAGES = [HOME / name for name in ("README.md", "CONTRIBUTING.md", "docs/structure.md", "starter/README.md")]
PAGES += sorted((HOME / "starter/cards").glob("*.md"))


def test_python_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (HOME / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert len(list((tmp_path / "out").glob("*.png"))) == 3


def test_commands_in_the_readme_parse() -> None:
    """Every ``safelight`` command of the README has options that exist."""
    text = (HOME / "README.md").read_text()
    commands = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    commands = [line.split("#")[0] for line in commands if re.match(r"(\.venv/bin/)?safelight ", line)]
    assert len(commands) >= 5
    for line in commands:
        words = shlex.split(line)[1:]
        help_of = [word for word in words if not word.startswith("-")][: 2 if words[0] == "models" else 1]
        shown = CliRunner().invoke(app, [*help_of, "--help"]).output
        for option in (word for word in words if word.startswith("-")):
            assert option in shown, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_place_is_left_to_be_filled_in(page: Path) -> None:
    assert not re.search(r"@[A-Z]+@|TODO|FIXME", page.read_text())
