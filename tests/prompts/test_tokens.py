"""The shipped tokenizer gives the ids of transformers' CLIP tokenizer."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle

from safelight.prompts.tokens import END, START, token_ids

THEIRS = oracle.tokenizer("<|endoftext|>")


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=120))
def test_ids_are_those_of_transformers(text: str) -> None:
    theirs = THEIRS(text, padding="max_length", max_length=77, truncation=True).input_ids
    assert token_ids(text, END)[0] == theirs


def test_known_ids() -> None:
    assert token_ids("a photo of a cat", END)[0][:7] == [START, 320, 1125, 539, 320, 2368, END]
    assert token_ids("", 0)[0] == [START, END] + [0] * 75
    ids, cut = token_ids("cat " * 100, END)
    assert (len(ids), ids[-1], cut) == (77, END, 25)
