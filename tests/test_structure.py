"""What the structure promises: each name has one meaning, files, classes and functions are small."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import safelight

SOURCE = Path(safelight.__file__).parent
MOST_LINES = 500
MOST_FUNCTION_LINES = 60
TABLES = {
    "pipeline/numerics/table.py: numeric_settings": "an entry for each setting, in the order in which a job sets them",
}
"""Functions that may be longer because they are tables, each with what a reader finds in it."""
MOST_METHODS = 20

FILES = sorted(SOURCE.rglob("*.py"))


def classes() -> Iterator[tuple[str, str]]:
    """(name, file) of every public class."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield node.name, str(path.relative_to(SOURCE))


def test_public_class_names_are_unique() -> None:
    where: dict[str, list[str]] = defaultdict(list)
    for name, file in classes():
        where[name].append(file)
    assert {name: files for name, files in where.items() if len(files) > 1} == {}


def test_no_file_is_longer_than_five_hundred_lines() -> None:
    lengths = {str(path.relative_to(SOURCE)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def functions() -> Iterator[tuple[str, int]]:
    """(file and name, lines) of every function, nested ones too."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                yield f"{path.relative_to(SOURCE)}: {node.name}", node.end_lineno - node.lineno + 1


def test_no_function_is_longer_than_sixty_lines() -> None:
    long = {name: lines for name, lines in functions() if lines > MOST_FUNCTION_LINES}
    assert {name: lines for name, lines in long.items() if name not in TABLES} == {}
    assert TABLES.keys() <= long.keys(), "a table that is short enough needs no exception"


def test_no_class_has_more_than_twenty_methods() -> None:
    """A class with more has a second subject. Properties and private methods count too."""
    counts = {
        f"{path.relative_to(SOURCE)}: {node.name}": sum(
            isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) for part in node.body
        )
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    assert len(counts) > 200
    assert {name: count for name, count in counts.items() if count > MOST_METHODS} == {}


def test_files_that_the_structure_names_are_there() -> None:
    page = (SOURCE.parents[1] / "docs/structure.md").read_text()
    named = {part for part in page.split("`") if part.endswith(".py") and "/" in part and " " not in part}
    assert len(named) > 40
    assert {name for name in named if not (SOURCE / name).exists()} == set()
