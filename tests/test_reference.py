"""The generated pages are up to date, and they name everything that a user can set, call, pass or get."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from support.extensions import HOME as EXTENSIONS

sys.path.append(str(Path(__file__).parents[1] / "tools"))

import fields
import licences
import reference
import settings

from safelight.settings import Settings

HOME = Path(__file__).parents[1]
SOURCE = HOME / "src/safelight"
Node = TypeVar("Node", bound=ast.AST)

INTERNAL = {
    "CompelSyntaxError": "request/prompts/compel_syntax.py turns it into a RequestError",
    "UnsupportedOperatorError": "request/prompts/compel_syntax.py turns it into a RequestError",
    "Unreadable": "files/pickle.py turns it into an UnsafeFileError or a CorruptFileError",
    "OverBudget": "memory/refusal.py turns it into an OutOfMemoryError",
    "NotThisArchitecture": "catalog/identify.py tries the next architecture",
    "ChoiceSyntaxError": "request/prompts/variants.py makes it a RequestError",
    "UnusableChoiceError": "request/prompts/variants.py makes it a RequestError",
}
"""Exceptions that no user gets, each with the reason."""


def page(name: str) -> str:
    return (HOME / "docs" / name).read_text()


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_page_of_the_reference_is_up_to_date(name: str) -> None:
    """The generator raises ValueError for a command, route, body or error class without a sentence."""
    assert page(name) == "\n".join(reference.PAGES[name]()), "run `make reference`"


def test_the_page_of_fields_is_up_to_date() -> None:
    assert page("fields.md") == "\n".join(fields.page()), "run `make fields`"


def test_the_page_of_settings_is_up_to_date() -> None:
    """The generator raises ValueError for a setting without a sentence."""
    assert page("settings.md") == "\n".join(settings.page()), "run `make settings`"


def test_every_package_has_its_licence() -> None:
    """Versions come and go, and other systems need other packages: what is installed here is listed."""
    listed = {line.split(" | ")[0].removeprefix("| ") for line in page("licences.md").splitlines()}
    assert set(licences.needed()) <= listed, "run `make licences`"


def test_the_reference_depends_neither_on_the_terminal_nor_on_installed_packages(tmp_path: Path) -> None:
    packages = [str(folder) for folder in sorted(EXTENSIONS.iterdir())]
    inherited = [str(HOME / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "COLUMNS": "20", "PYTHONPATH": os.pathsep.join([*packages, *inherited])}
    environment |= {"SAFELIGHT_DEFAULT_MODEL": "other", "SAFELIGHT_PORT": "1"}
    command = [sys.executable, str(HOME / "tools/reference.py"), str(tmp_path)]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    for name in reference.PAGES:
        assert (tmp_path / name).read_text() == page(name)


def test_each_setting_is_in_the_reference() -> None:
    text = page("settings.md")
    assert [name for name in Settings.model_fields if f"| `{name}` |" not in text] == []


def test_each_route_of_the_source_is_in_the_reference() -> None:
    """The source is read, so that a route which the generator leaves out is missed here."""
    named = re.findall(r"^### `([A-Z]+) (/\S*)`$", page("api.md"), re.MULTILINE)
    found = list(routes())
    assert len(found) > 50
    for method, path in found:
        assert any(known == method and full.endswith(path) for known, full in named), (method, path)
    assert len(named) == len(found)


def routes() -> Iterator[tuple[str, str]]:
    """Method and path of every call such as ``api.get("/models")`` in the server, also in a loop over paths."""
    for method, path in (called for call in nodes(SOURCE / "server", ast.Call) if (called := route(call))):
        if isinstance(path, ast.Constant):
            yield method, str(path.value)
    for loop in nodes(SOURCE / "server", ast.For):
        for part in ast.walk(loop):
            called = route(part) if isinstance(part, ast.Call) else None
            if called and isinstance(called[1], ast.Name):
                yield from ((called[0], path) for path in ast.literal_eval(loop.iter))


def route(call: ast.Call) -> tuple[str, ast.expr] | None:
    function = call.func
    if not isinstance(function, ast.Attribute) or ast.unparse(function.value) not in ("api", "outside", "routes"):
        return None
    return (function.attr.upper(), call.args[0]) if function.attr in ("get", "post", "put", "patch", "delete") else None


def nodes(folder: Path, kind: type[Node]) -> Iterator[Node]:
    for path in sorted(folder.rglob("*.py")):
        yield from (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kind))


def test_each_command_and_option_is_in_the_reference() -> None:
    text = page("commands.md")
    for words, command in reference.every_command():
        section = text.partition(f"\n## `{words}`\n")[2].partition("\n## ")[0]
        assert section, words
        for parameter in command.params:
            if parameter.opts[0].startswith("-"):
                missing = [name for name in (*parameter.opts, *parameter.secondary_opts) if f"`{name}`" not in section]
                assert missing == [], words
            else:
                assert f"| `{parameter.metavar or parameter.name.upper()}` |" in section, words


def test_each_option_of_the_source_is_in_the_reference() -> None:
    """Names in the calls of ``typer.Option`` that the generator would leave out, such as those of a hidden command."""
    text = page("commands.md")
    names = [
        str(argument.value)
        for call in nodes(SOURCE / "cli", ast.Call)
        if ast.unparse(call.func) == "typer.Option"
        for argument in call.args
        if isinstance(argument, ast.Constant) and str(argument.value).startswith("-")
    ]
    assert len(names) > 15
    for name in names:
        assert all(f"`{part}`" in text for part in name.split("/")), name


def test_each_error_class_is_in_the_reference() -> None:
    text = page("errors.md")
    bases = {
        node.name: {ast.unparse(base).rpartition(".")[2] for base in node.bases} for node in nodes(SOURCE, ast.ClassDef)
    }
    builtin = {"Exception", "ValueError", "RuntimeError", "OSError", "MemoryError", "KeyError", "TypeError"}

    def is_error(name: str) -> bool:
        return bool(bases.get(name, set()) & builtin) or any(map(is_error, bases.get(name, ())))

    found = {name for name in bases if is_error(name) and not name.startswith("_")}
    assert len(found) > 25
    assert {name for name in found if f"| `{name}` |" not in text} == INTERNAL.keys()
