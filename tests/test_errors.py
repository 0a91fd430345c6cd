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


def test_each_class_has_its_answer() -> None:
    real = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}
    assert real == errors.ANSWERS.keys()


def test_an_invalid_input_is_the_fault_of_the_user() -> None:
    """A full disk is not."""
    for error, answer in errors.ANSWERS.items():
        if issubclass(error, errors.InputError) and error is not errors.StorageError:
            assert (answer.exit_code, answer.status // 100) == (2, 4), error
        else:
            assert answer.exit_code != 2, error


def test_a_class_of_another_package_has_the_answer_of_the_class_above_it() -> None:
    class OddFileError(errors.CorruptFileError):
        pass

    assert errors.answer_to(OddFileError) == errors.ANSWERS[errors.CorruptFileError]
