"""Words of prompts that stand for textual inversions: ``<name>``, ``embedding:name`` (ComfyUI's), or the plain name, as
AUTOMATIC1111 takes it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from safelight.prompts.tags import MARK

_MARKED = re.compile(rf"{MARK.pattern}|\bembedding:([\w.+-]*\w)")
"""Marked as embeddings, whether there is one of that name or not."""

FIRST_SPARE = 49405
"""The last token of CLIP's vocabulary that is text; the rarest are last."""

Words = Mapping[str, tuple[int, ...]]
"""Text that stands for vectors, and the tokens whose places these take."""


def named(texts: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """The embeddings that texts name, word to name: those that are marked as such, and plain words that are ``known``
    names, in whatever case, as AUTOMATIC1111 takes them."""
    listed = {name.lower(): name for name in sorted(known, reverse=True)}
    pattern = _pattern(sorted(listed, key=len, reverse=True))
    found: dict[str, str] = {}
    for text in texts:
        for mark in pattern.finditer(text):
            name = next(group for group in mark.groups() if group is not None)
            found[mark[0]] = listed.get(name.lower(), name)
    return found


def _pattern(known: Sequence[str]) -> re.Pattern[str]:
    """Known names first, marked or plain, the longest first; then whatever else is marked."""
    either = "|".join(map(re.escape, known))
    marked = rf"<({either})>|\bembedding:({either})(?![\w-])|" if known else ""
    plain = rf"|(?<![\w-])({either})(?![\w-])" if known else ""
    return re.compile(f"{marked}{_MARKED.pattern}{plain}", re.IGNORECASE)


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
