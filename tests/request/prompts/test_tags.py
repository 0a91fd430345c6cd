"""Angle brackets: what has the form of a name is a name, and what nothing does is refused."""

from __future__ import annotations

import pytest

from safelight.errors import RequestError
from safelight.request.prompts import tags
from safelight.request.prompts.words import find_embeddings


@pytest.mark.parametrize(
    "text",
    [
        "1girl, >_<, smile",
        ">_<, blush, >w<",
        ">_<, open mouth, :>",
        "a < b and b > c",
        "I <3 you, you > me",
        "<3>",
        "x<y",
    ],
)
def test_emoticons_and_comparisons_are_text(text: str) -> None:
    assert find_embeddings([text], ["cat"]) == {}
    tags.refuse_unknown("prompt", text, "a1111")


def test_marked_names_are_embeddings_known_or_not() -> None:
    known = ["my style", "cat.v2", "国风"]
    texts = ["<my style>, <CAT.v2> embedding:国风 <nosuch> embedding:no-such, my style"]
    assert find_embeddings(texts, known) == {
        "<my style>": "my style",
        "<CAT.v2>": "cat.v2",
        "embedding:国风": "国风",
        "<nosuch>": "nosuch",
        "embedding:no-such": "no-such",
        "my style": "my style",
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cat AND dog", "AND between prompts"),
        ("cat :1.2 AND dog :0.5", "AND between prompts"),
        ("apple <hypernet:anime:0.6>", "no <hypernet:…>"),
        ("apple <lroa:ink:0.8>", "did you mean <lora:…>"),
        ("apple <LORA:ink:0.8>", "did you mean <lora:…>"),
        ("apple <lora:ink:0.8", "begins like a tag but is none"),
        ("apple < lora:ink:0.8>", "write <lora:NAME:1>"),
        ("apple <lora;ink:0.8>", "begins like a tag"),
        ("apple \u2039lora\uff1aink\uff1a1>", "begins like a tag"),
        ("cat,AND dog", "AND between prompts"),
        ("cat AND:0.5 dog", "AND between prompts"),
    ],
)
def test_what_nothing_does_is_refused_by_name(text: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        tags.refuse_unknown("prompt", text, "a1111")


def test_small_letters_and_compounds_are_words() -> None:
    tags.refuse_unknown("prompt", "salt and pepper, black AND-gate, BRAND, <lora:a:1> <lyco:b:1>", "a1111")
    tags.refuse_unknown("prompt", "cat AND dog", "compel")
