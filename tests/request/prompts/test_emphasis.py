"""Weights in prompts: AUTOMATIC1111's documented examples, and what is wrong is pointed at."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.errors import RequestError
from safelight.request.prompts.emphasis import spans, unbalanced

LETTERS = st.characters(exclude_characters="()[]\\:", exclude_categories=["Cs"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a word", [("a word", 1)]),
        ("a (word)", [("a ", 1), ("word", 1.1)]),
        ("a ((word))", [("a ", 1), ("word", 1.21)]),
        ("a [word]", [("a ", 1), ("word", 1 / 1.1)]),
        ("a (word:1.5)", [("a ", 1), ("word", 1.5)]),
        ("a (word:0.25)", [("a ", 1), ("word", 0.25)]),
        (r"a \(word\)", [("a (word)", 1)]),
        ("(a:1.2) (b [c])", [("a", 1.2), (" ", 1), ("b ", 1.1), ("c", 1)]),
        ("ratio 16:9, (ratio 16:9)", [("ratio 16:9, ", 1), ("ratio 16", 9)]),
        ("a : b", [("a : b", 1)]),
        ("(a: b)", [("a: b", 1.1)]),
        ("", []),
        (r"back\slash", [(r"back\slash", 1)]),
        ("(((a)))", [("a", 1.331)]),
        ("(a:-1)", [("a", -1)]),
    ],
)
def test_weights(text: str, expected: list[tuple[str, float]]) -> None:
    found = spans("prompt", text)
    assert [(span.text, pytest.approx(span.weight)) for span in found] == expected
    assert not any(span.breaks for span in found)


@pytest.mark.parametrize(
    ("text", "expected", "notes"),
    [
        ("(red apple", [("red apple", 1.1)], ["( at character 0 is never closed"]),
        ("((red apple", [("red apple", 1.21)], ["( at character 0 is", "( at character 1 is"]),
        ("[red apple", [("red apple", 1 / 1.1)], ["[ at character 0 is never closed"]),
        ("red apple)", [("red apple)", 1)], [") at character 9 closes nothing"]),
        ("(red (apple", [("red ", 1.1), ("apple", 1.21)], ["( at character 0 is", "( at character 5 is"]),
        ("(red:1.2", [("red:1.2", 1.1)], ["( at character 0 is"]),
        ("(a]", [("a]", 1.1)], ["( at character 0 is", "] at character 2 closes nothing"]),
        ("([a)]", [("a", 1.0)], []),
        (r"\(a", [("(a", 1)], []),
    ],
)
def test_brackets_that_do_not_match_are_taken_as_automatic1111_takes_them(
    text: str, expected: list[tuple[str, float]], notes: list[str]
) -> None:
    assert [(span.text, pytest.approx(span.weight)) for span in spans("prompt", text)] == expected
    told = unbalanced(text)
    assert len(told) == len(notes)
    assert all(note in one for note, one in zip(notes, told, strict=True))


def test_break_begins_another_chunk() -> None:
    found = spans("prompt", "a BREAK (b BREAK c), BREAKFAST")
    assert [(span.text, span.breaks) for span in found] == [
        ("a", False),
        ("", True),
        ("b", False),
        ("c", True),
        (", BREAKFAST", False),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("(" * 200, "more than 100 nested brackets"),
        ("(a:1000)", "a weight of 1000 is over 100"),
    ],
)
def test_what_is_wrong_is_pointed_at(text: str, says: str) -> None:
    with pytest.raises(RequestError, match=says.replace("(", r"\(").replace(")", r"\)")):
        spans("prompt", text)


@settings(deadline=None)
@given(st.text(alphabet=LETTERS, max_size=60).filter(lambda text: "BREAK" not in text))
def test_a_prompt_without_brackets_is_itself(text: str) -> None:
    assert "".join(span.text for span in spans("prompt", text)) == text


@settings(deadline=None)
@given(st.text(alphabet="ab()[]\\:1.", max_size=40))
def test_whatever_is_written_is_parsed_or_refused(text: str) -> None:
    try:
        found = spans("prompt", text)
    except RequestError:
        return
    assert all(span.weight for span in found) or "0" in text or ":." in text
