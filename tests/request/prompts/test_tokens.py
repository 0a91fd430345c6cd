"""The shipped tokenizer gives the ids of transformers' CLIP tokenizer; long prompts go on in further chunks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle

from safelight.errors import RequestError
from safelight.request.prompts.tokens import COMMA, END, MOST_CHUNKS, START, TOKENS_PER_CHUNK, chunks

THEIRS = oracle.tokenizer("<|endoftext|>")
LETTERS = st.characters(exclude_characters="()[]\\:", exclude_categories=["Cs"])
PLAIN = st.text(alphabet=LETTERS, max_size=120).filter(lambda text: "BREAK" not in text)


@settings(max_examples=300, deadline=None)
@given(PLAIN)
def test_ids_are_those_of_transformers(text: str) -> None:
    ids = THEIRS(text).input_ids
    found = chunks("prompt", text, END)
    if len(ids) <= 77:
        assert [list(chunk.ids) for chunk in found] == [ids + [END] * (77 - len(ids))]
    inner = [token for chunk in found for token in chunk.ids[1:] if token != END]
    assert inner == [token for token in ids[1:-1] if token != END]


def test_known_ids() -> None:
    (chunk,) = chunks("prompt", "a photo of a cat", END)
    assert chunk.ids[:7] == (START, 320, 1125, 539, 320, 2368, END)
    assert chunk.weights is None
    assert chunks("prompt", "", 0)[0].ids == (START, END, *[0] * 75)


def test_a_long_prompt_goes_on_behind_a_comma_near_the_end() -> None:
    assert [chunk.ids.count(2368) for chunk in chunks("prompt", "cat " * 100, END)] == [
        TOKENS_PER_CHUNK,
        100 - TOKENS_PER_CHUNK,
    ]
    first, second = chunks("prompt", "cat " * 60 + ", " + "dog " * 30, END)
    assert first.ids[61] == COMMA
    assert first.ids[62] == END
    assert second.ids.count(1929) == 30
    first, second = chunks("prompt", "cat " * 40 + ", " + "dog " * 60, END)
    assert first.ids.count(1929) == TOKENS_PER_CHUNK - 41
    with pytest.raises(RequestError, match=f"at most {MOST_CHUNKS}"):
        chunks("prompt", "cat " * 75 * 33, END)


def test_weights_stand_beside_their_tokens() -> None:
    first, second = chunks("prompt", "a (photo:1.3) BREAK [cat]", END)
    assert first.weights is not None
    assert first.weights[:4] == (1.0, 1.0, 1.3, 1.0)
    assert second.weights is not None
    assert second.weights[1] == pytest.approx(1 / 1.1)
    assert len(first.weights) == len(second.weights) == 77


def test_a_comma_at_the_end_takes_nothing_with_it() -> None:
    """As AUTOMATIC1111 has it: only what is not a comma moves the words behind the last one."""
    first, second = chunks("prompt", "cat " * 60 + ", " + "dog " * 14 + ", fox", END)
    assert (first.ids.count(1929), second.ids.count(1929)) == (14, 0)
    first, second = chunks("prompt", "cat " * 60 + ", " + "dog " * 14 + "fox", END)
    assert (first.ids.count(1929), second.ids.count(1929)) == (0, 14)
