"""How much the tests repeat: ``make test`` repeats little, ``make test-all`` runs every case and long sequences."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest

ALL = os.environ.get("TEST_SCALE") == "all"


def times(few: int, many: int) -> int:
    """The number of repetitions: ``few`` in `make test`, ``many`` in `make test-all`."""
    return many if ALL else few


def thinned(values: Iterable[Any], keep: int = 1, unpack: bool = False) -> list[Any]:
    """The cases of a matrix: `make test` runs the first ``keep``, `make test-all` runs all.

    ``unpack``: each value is a tuple of the values of several parameters.
    """
    return [
        value if number < keep else pytest.param(*(value if unpack else (value,)), marks=pytest.mark.full)
        for number, value in enumerate(values)
    ]
