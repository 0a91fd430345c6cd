"""The tree in the docstring is the tree of the classes, and messages say what, where and what to do."""

from __future__ import annotations

import re
from pathlib import Path

from safelight import errors


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__ or "")
    real = [
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.SafelightError) and value is not errors.SafelightError
    ]
    assert sorted(drawn) == sorted(real)


def test_long_lists_of_names_are_cut() -> None:
    names = [f"tensor.{i}" for i in range(900)]
    message = str(errors.IncompleteModelError(Path("m"), "sd1 checkpoint", missing=names))
    assert "missing: 900" in message
    assert "and 895 more" in message
    assert len(message) < 300


def test_a_file_of_unknown_tensors_is_not_to_be_downloaded_again() -> None:
    message = str(errors.IncompleteModelError(Path("m"), "sd1 checkpoint", unexpected=["odd"]))
    assert "this sd1 checkpoint has unknown tensors: 1 (odd)" in message
    assert "Download" not in message
    assert "Download it again" in str(errors.IncompleteModelError(Path("m"), "sd1 checkpoint", ["a"], (), ["odd"]))


def test_an_empty_library_is_told_from_an_unknown_name() -> None:
    assert "the library has no model; add one" in str(errors.ModelNotFoundError(None, []))
    assert "no model named ''" in str(errors.ModelNotFoundError("", []))
    assert "own; the name of a model selects that model's VAE" in str(errors.ModelNotFoundError("x", [], "VAE"))
