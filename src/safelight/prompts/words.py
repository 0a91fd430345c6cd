"""Words of prompts that stand for textual inversions: ``<name>``, ``embedding:name`` (ComfyUI's), or the plain name, as
AUTOMATIC1111 takes it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

_MARKED = re.compile(r"<([^<>:|]+)>|\bembedding:([A-Za-z0-9._+-]*[A-Za-z0-9])")
"""Marked as embeddings, whether there is one of that name or not."""

FIRST_SPARE = 49405
"""The last token of CLIP's vocabulary that is text; the rarest are last."""

Words = Mapping[str, tuple[int, ...]]
"""Text that stands for vectors, and the tokens whose places these take."""


def named(texts: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """The embeddings that texts name, word to name: those that are marked as such, and plain words that are ``known``
    names, in whatever case, as AUTOMATIC1111 takes them."""
    listed = {name.lower(): name for name in sorted(known, reverse=True)}
    longest = sorted(listed, key=len, reverse=True)
    either = "|".join(rf"(?<![\w-]){re.escape(name)}(?![\w-])" for name in longest)
    plain = re.compile(either, re.IGNORECASE) if listed else None
    found: dict[str, str] = {}
    for text in texts:
        rest = text
        for mark in _MARKED.finditer(text):
            name = mark[1] or mark[2]
            found[mark[0]] = listed.get(name.lower(), name)
            rest = rest.replace(mark[0], " ")
        if plain is not None:
            found |= {word: listed[word.lower()] for word in plain.findall(rest) if word.lower() in listed}
    return found


def places(counts: Mapping[str, int], used: Iterable[int]) -> Words:
    """For each word tokens whose places its vectors take, as many as it has vectors: none that is ``used``, so nothing
    else in the prompts changes its meaning."""
    taken, token = set(used), FIRST_SPARE
    out: dict[str, tuple[int, ...]] = {}
    for word in sorted(counts):
        chosen: list[int] = []
        while len(chosen) < counts[word]:
            if token not in taken:
                chosen.append(token)
            token -= 1
        out[word] = tuple(chosen)
    return out


def cut(text: str, words: Words) -> Sequence[str | tuple[int, ...]]:
    """The text at its words: what is tokenized, and tokens."""
    if not words:
        return [text]
    pattern = "|".join(_whole(word) for word in sorted(words, key=len, reverse=True))
    out: list[str | tuple[int, ...]] = []
    at = 0
    for found in re.finditer(pattern, text):
        out += [text[at : found.start()], words[found[0]]]
        at = found.end()
    return [piece for piece in (*out, text[at:]) if piece]


def _whole(word: str) -> str:
    before = r"(?<![\w-])" if re.match(r"\w", word) else ""
    after = r"(?![\w-])" if re.search(r"\w$", word) else ""
    return before + re.escape(word) + after
