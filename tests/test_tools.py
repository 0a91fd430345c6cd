"""The long checks know their places: what `make mutants` changes is there, and its tests are."""

from __future__ import annotations

import sys
from pathlib import Path

HOME = Path(__file__).parents[1]
sys.path.insert(0, str(HOME / "tools"))

import mutants  # noqa: E402
import parity  # noqa: E402


def test_every_mutant_has_its_place_and_its_tests() -> None:
    for mutant in mutants.MUTANTS:
        text = (HOME / "src/safelight" / mutant.file).read_text()
        assert text.count(mutant.old) == 1, mutant.name
        # A mutant that is no Python turns every test red, or none.
        compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")
        assert_there(mutant.tests)


def test_every_row_of_the_parity_page_has_its_tests() -> None:
    for row in parity.ROWS:
        assert_there(row.tests)


def assert_there(tests: str) -> None:
    """Each is a folder or file of tests, or a function in one."""
    for test in tests.split():
        file, _, function = test.partition("::")
        assert (HOME / file).exists(), test
        if function:
            assert f"def {function.partition('[')[0]}(" in (HOME / file).read_text(), test
