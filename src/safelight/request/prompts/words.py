"""Words in prompts that name textual inversions: ``<name>``, ``embedding:name`` (ComfyUI), or the plain name
(AUTOMATIC1111)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from safelight.request.prompts.tags import INVERSION_TAG

_MARKED = re.compile(rf"{INVERSION_TAG.pattern}|\bembedding:([\w.+-]*\w)")
"""Words marked as embeddings, even if no embedding of that name exists."""

_FIRST = re.compile(r"\w+|[\[({]")
_BEGINS = re.compile(r"(?P<mark><|\bembedding:|(?<![\w-]))(?P<first>\w+|[\[({])")
"""A possible start of a name: its mark, and its first word or bracket."""

_GOES_ON = re.compile(r"[\w-]")

HIGHEST_TEXT_TOKEN = 49405
"""Token ids for textual inversions are assigned from this id downwards. It is the highest id that is not a special
token; high ids are the rarest tokens."""

InversionTokens = Mapping[str, tuple[int, ...]]
"""CLIP token ids by word. Each word gets rare, unused ids; the inversion's vectors overwrite their embeddings."""


def find_embeddings(texts: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Find the embeddings that texts name. Return the embedding's name by the word in the text.

    A word names an embedding if it is marked as one, or if it is one of the ``known`` names. As in AUTOMATIC1111, case
    does not matter.
    """
    by_first = _by_first(tuple(known))
    found: dict[str, str] = {}
    for text in texts:
        at = 0
        while begin := _BEGINS.search(text, at):
            at = begin.end()
            for name in by_first.get(begin["first"].lower(), ()):
                written = re.compile(re.escape(name), re.IGNORECASE).match(text, begin.start("first"))
                if written and (end := _end(text, begin["mark"], written.end())):
                    found[text[begin.start() : end]] = name
                    at = end
                    break
            else:
                marked = _MARKED.match(text, begin.start()) if begin["mark"] else None
                if marked:
                    found[marked[0]] = marked[1] or marked[2]
                    at = marked.end()
                elif begin["mark"]:
                    at = begin.start("first")
    return found


def _end(text: str, mark: str, end: int) -> int:
    """Return the position after a name and its mark; 0 if the word continues or its bracket is not closed."""
    if mark == "<":
        return end + 1 if text[end : end + 1] == ">" else 0
    return end if not _GOES_ON.match(text, end) else 0


@lru_cache(maxsize=32)
def _by_first(known: tuple[str, ...]) -> Mapping[str, tuple[str, ...]]:
    """Group names by their first word in lower case. The longest names come first."""
    found: dict[str, list[str]] = {}
    for name in sorted({name.lower(): name for name in sorted(known, reverse=True)}.values(), key=len, reverse=True):
        first = _FIRST.match(name)
        if first is not None:
            found.setdefault(first[0].lower(), []).append(name)
    return {first: tuple(names) for first, names in found.items()}


def assign_tokens(counts: Mapping[str, int], used: Iterable[int]) -> InversionTokens:
    """Assign tokens to each word; the word's vectors replace them.

    ``counts``: the number of vectors of each word.
    ``used``: tokens in the prompts. None of them is assigned, so that no other text changes its meaning.
    """
    taken, token = set(used), HIGHEST_TEXT_TOKEN
    out: dict[str, tuple[int, ...]] = {}
    for word in sorted(counts):
        chosen: list[int] = []
        while len(chosen) < counts[word]:
            if token not in taken:
                chosen.append(token)
            token -= 1
        out[word] = tuple(chosen)
    return out


def cut(text: str, inversion_tokens: InversionTokens) -> Sequence[str | tuple[int, ...]]:
    """Split a text at the words of textual inversions. Return strings, still to be tokenized, and the words' tokens."""
    if not inversion_tokens:
        return [text]
    pattern = "|".join(_whole(word) for word in sorted(inversion_tokens, key=len, reverse=True))
    out: list[str | tuple[int, ...]] = []
    at = 0
    for found in re.finditer(pattern, text):
        out += [text[at : found.start()], inversion_tokens[found[0]]]
        at = found.end()
    return [piece for piece in (*out, text[at:]) if piece]


def _whole(word: str) -> str:
    before = r"(?<![\w-])" if re.match(r"\w", word) else ""
    after = r"(?![\w-])" if re.search(r"\w$", word) else ""
    return before + re.escape(word) + after
