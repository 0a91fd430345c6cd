"""Words of prompts that stand for vectors, and the tokens whose assign_tokens these take."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from safelight.request.prompts.tokens import END, START, tokens_of, vocabulary
from safelight.request.prompts.words import HIGHEST_TEXT_TOKEN, assign_tokens, cut, find_embeddings


def test_tokens_are_taken_that_no_prompt_has() -> None:
    rare = "".join(vocabulary()[HIGHEST_TEXT_TOKEN - n] for n in range(2)).replace("</w>", " ")
    used = set(tokens_of(rare))
    assert used & {HIGHEST_TEXT_TOKEN, HIGHEST_TEXT_TOKEN - 1}
    taken = assign_tokens({"a": 3, "b": 2}, used)
    every = [token for tokens in taken.values() for token in tokens]
    assert len(set(every)) == 5
    assert not used & set(every)
    assert not {START, END} & set(every)


WORDS = st.dictionaries(st.text("ab<>", min_size=1, max_size=3), st.integers(1, 5), max_size=4)


@given(WORDS, st.sets(st.integers(49380, 49405)))
def test_each_word_has_places_of_its_own(counts: dict[str, int], used: set[int]) -> None:
    taken = assign_tokens(counts, used)
    every = [token for tokens in taken.values() for token in tokens]
    assert {word: len(tokens) for word, tokens in taken.items()} == counts
    assert len(set(every)) == len(every)
    assert not used & set(every)


def test_words_are_found_and_cut() -> None:
    known = ["cat", "EasyThing", "big-cat"]
    marked = {"cat": "cat", "<dog>": "dog", "embedding:bird": "bird"}
    assert find_embeddings(["a cat, a <dog> and embedding:bird"], known) == marked
    assert find_embeddings(["concatenate", "a big-cat", "easything!"], known) == {
        "big-cat": "big-cat",
        "easything": "EasyThing",
    }
    assert cut("a cat and <dog>", {"cat": (1,), "<dog>": (2, 3)}) == ["a ", (1,), " and ", (2, 3)]
    assert cut("scatter", {"cat": (1,)}) == ["scatter"]
    assert cut("plain", {}) == ["plain"]
