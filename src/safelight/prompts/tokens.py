"""CLIP's tokenizer: a prompt to chunks of token ids with their weights, from the file that ships with Safelight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from tokenizers import Tokenizer

from safelight.errors import RequestError
from safelight.prompts.emphasis import spans
from safelight.prompts.words import Words, cut

VOCABULARY = Path(__file__).with_name("clip_tokenizer.json")
"""Made by ``tools/make_tokenizer.py`` from OpenAI's byte-pair vocabulary; its licence is beside it."""

POSITIONS = 77
START, END = 49406, 49407
ROOM = POSITIONS - 2
"""Tokens of the prompt in a chunk."""

COMMA = 267
"""The token of a comma that ends a word."""

BACKTRACK = 20
"""A chunk ends behind a comma that is at most so many tokens before its end, as AUTOMATIC1111 has it."""

MOST_CHUNKS = 32


@dataclass(frozen=True, slots=True)
class Chunk:
    """``ids``: :data:`POSITIONS` of them. ``weights``: of each, None where all are 1."""

    ids: tuple[int, ...]
    weights: tuple[float, ...] | None


NO_WORDS: Words = MappingProxyType({})


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(VOCABULARY))


@cache
def vocabulary() -> dict[int, str]:
    """The tokens by their ids."""
    return {token: text for text, token in _tokenizer().get_vocab().items()}


def tokens_of(text: str) -> list[int]:
    """The ids of a text, nothing before or behind them."""
    return _tokenizer().encode(text, add_special_tokens=False).ids


def used(field: str, text: str, words: Iterable[str]) -> set[int]:
    """The ids that a prompt has beside those of its ``words``. Raises RequestError for what cannot be parsed."""
    nothing: Words = dict.fromkeys(words, ())
    pieces = [piece for span in spans(field, text) for piece in cut(span.text, nothing)]
    return {token for piece in pieces if isinstance(piece, str) for token in tokens_of(piece)}


def chunks(field: str, text: str, pad_id: int, words: Words = NO_WORDS) -> list[Chunk]:
    """The prompt in chunks that a text encoder reads one by one; at least one.

    Each: start token, text, end token, and ``pad_id`` up to :data:`POSITIONS`. The tokens of one of the ``words`` stay
    together, in a chunk of their own where they do not fit. Raises RequestError for a prompt that cannot be parsed or
    is longer than :data:`MOST_CHUNKS` chunks.
    """
    parts: list[list[tuple[int, float]]] = [[]]
    for span in spans(field, text):
        if span.breaks:
            parts.append([])
        for piece in cut(span.text, words):
            if isinstance(piece, tuple):
                if len(parts[-1]) == ROOM:
                    parts.append(_carried(parts[-1]))
                if len(parts[-1]) + len(piece) > ROOM:
                    parts.append([])
                parts[-1] += [(token, span.weight) for token in piece]
                continue
            for token in tokens_of(piece):
                if len(parts[-1]) == ROOM:
                    # A comma itself takes nothing with it.
                    parts.append([] if token == COMMA else _carried(parts[-1]))
                parts[-1].append((token, span.weight))
    if len(parts) > MOST_CHUNKS:
        raise RequestError(field, f"{text[:20]}…", f"{len(parts)} chunks of {ROOM} tokens; at most {MOST_CHUNKS}")
    return [_chunk(part, pad_id) for part in parts]


def _carried(full: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """What of a full chunk goes into the next: all behind its last comma, if that is near its end."""
    for back in range(BACKTRACK):
        if full[len(full) - 1 - back][0] == COMMA:
            keep = len(full) - back
            carried = full[keep:]
            del full[keep:]
            return carried
    return []


def _chunk(tokens: Sequence[tuple[int, float]], pad_id: int) -> Chunk:
    ids = [START, *(token for token, _ in tokens), END]
    rest = POSITIONS - len(ids)
    weights = (1.0, *(weight for _, weight in tokens), 1.0, *(1.0 for _ in range(rest)))
    return Chunk((*ids, *(pad_id for _ in range(rest))), None if set(weights) == {1.0} else weights)
