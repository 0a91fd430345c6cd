"""Examples in the documents are executed, and links lead somewhere."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).parents[1] / "tools"))

import fields
import licences
import settings

from safelight.cli.main import app

HOME = Path(__file__).parents[1]
NAMES = ("README.md", "CONTRIBUTING.md", "starter/README.md")
PAGES = [HOME / name for name in NAMES] + sorted((HOME / "docs").glob("*.md"))
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
        if words[0].startswith("-"):
            assert words[0] in CliRunner().invoke(app, ["--help"]).output
            words = words[2:]
        help_of = [word for word in words if not word.startswith("-")][: 2 if words[0] in ("models", "config") else 1]
        shown = CliRunner().invoke(app, [*help_of, "--help"]).output
        for option in (word for word in words if word.startswith("-")):
            assert option in shown, line


def test_the_page_of_fields_is_what_the_schema_says() -> None:
    assert (HOME / "docs/fields.md").read_text() == "\n".join(fields.page()), "run `make fields`"


def test_the_page_of_settings_matches_the_declarations() -> None:
    """The generator raises ValueError for a setting without a sentence."""
    assert (HOME / "docs/settings.md").read_text() == "\n".join(settings.page()), "run `make settings`"


def test_every_package_has_its_licence() -> None:
    """Versions come and go, and other systems need other packages: what is installed here is listed."""
    lines = (HOME / "docs/licences.md").read_text().splitlines()
    listed = {line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")}
    assert set(licences.needed()) <= listed, "run `make licences`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_tests_that_the_documents_name_are_there() -> None:
    text = (HOME / "docs/corruption.md").read_text()
    every = "".join(path.read_text() for path in (HOME / "tests").rglob("*.py"))
    for name in re.findall(r"(?<!/)(test_[a-z0-9_]+)(?!\.py|[a-z0-9_]*\.py)", text):
        assert name.rstrip("_") in every, name
    for path in re.findall(r"`((?:tests|memory|devices|arch)/[a-z0-9_/]+(?:\.py)?)", text):
        assert (HOME / path).exists() or (HOME / "src/safelight" / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_place_is_left_to_be_filled_in(page: Path) -> None:
    assert not re.search(r"@[A-Z]+@|TODO|FIXME", page.read_text())
