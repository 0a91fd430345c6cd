"""Prompts that change between steps: AUTOMATIC1111's documented examples."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight.errors import RequestError
from safelight.request.prompts.editing import prompt_per_step

LONG = (
    "[mountain lake:fantasy landscape:0.25] with [an oak:a christmas tree:0.75]"
    "[ in foreground::0.6][: in background:0.25] [shoddy:masterful:0.5]"
)


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (1, "mountain lake with an oak in foreground shoddy"),
        (25, "mountain lake with an oak in foreground shoddy"),
        (26, "fantasy landscape with an oak in foreground in background shoddy"),
        (51, "fantasy landscape with an oak in foreground in background masterful"),
        (61, "fantasy landscape with an oak in background masterful"),
        (76, "fantasy landscape with a christmas tree in background masterful"),
    ],
    ids=lambda value: f"step {value}" if isinstance(value, int) else None,
)
def test_the_documented_example(step: int, text: str) -> None:
    """At 100 steps: 25, 50, 60 and 75 are where it changes."""
    assert prompt_per_step("prompt", LONG, 100)[step - 1] == text


@pytest.mark.parametrize(
    ("text", "steps", "each"),
    [
        ("a [fantasy:cyberpunk:2] landscape", 4, ["a fantasy landscape"] * 2 + ["a cyberpunk landscape"] * 2),
        ("[cow|horse] in a field", 3, ["cow in a field", "horse in a field", "cow in a field"]),
        ("[cow|horse|man] x", 4, ["cow x", "horse x", "man x", "cow x"]),
        ("[added:2]", 4, ["", "", "added", "added"]),
        ("[removed::1]", 3, ["removed", "", ""]),
        ("[|b]", 2, ["", "b"]),
        ("[a [b:c:1]:d:3]", 4, ["a b", "a c", "a c", "d"]),
        ("[(a:1.2):b:1] [x]", 2, ["(a:1.2) [x]", "b [x]"]),
        ("(a [b:c:0.5]:1.3)", 2, ["(a b:1.3)", "(a c:1.3)"]),
        (r"\[a:b:0.5\] [c:d:0.5]", 2, [r"\[a:b:0.5\] c", r"\[a:b:0.5\] d"]),
        ("[a:b]", 2, ["[a:b]"] * 2),
        ("[a:b:0]", 2, ["b"] * 2),
        ("[a:b:2.0]", 2, ["a"] * 2),
        ("[a:b:7]", 2, ["a"] * 2),
        ("[a:b: 0.5 ]", 2, ["a", "b"]),
        ("plain (text:1.2)", 2, ["plain (text:1.2)"] * 2),
        ("[never closed", 1, ["[never closed"]),
        ("closed] before", 1, ["closed] before"]),
    ],
    ids=lambda value: f"{value} steps" if isinstance(value, int) else None,
)
def test_every_form(text: str, steps: int, each: list[str]) -> None:
    assert prompt_per_step("prompt", text, steps) == each


def test_what_is_no_edit_is_said_with_its_place() -> None:
    with pytest.raises(RequestError, match=r"at character 2: an edit is \[from:to:when\]"):
        prompt_per_step("prompt", "a [b:c:d:0.5]", 10)


@given(st.text(alphabet="ab[]():|.05\\ ", max_size=40), st.integers(1, 6))
def test_anything_is_a_text_for_each_step_or_an_error(text: str, steps: int) -> None:
    try:
        found = prompt_per_step("prompt", text, steps)
    except RequestError:
        return
    assert len(found) == steps
    if "[" not in text:
        assert found == [text] * steps


def test_huge_numbers_and_depths() -> None:
    assert prompt_per_step("prompt", f"[a:b:{'9' * 400}]", 2) == ["a", "a"]
    with pytest.raises(RequestError, match="nested brackets"):
        prompt_per_step("prompt", "[" * 600, 2)


def test_in_a_second_pass_edits_are_over_and_alternation_goes_on() -> None:
    assert prompt_per_step("prompt", "[a:b:1.0] [c|d]", 3, 2) == ["a c", "a d", "a c", "b d", "b c"]
