"""CLIP's tokenizer. Turns a prompt into chunks of token ids with weights. The vocabulary file ships with Safelight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from safelight.errors import RequestError
from safelight.request.prompts.emphasis import spans
from safelight.request.prompts.words import InversionTokens, cut

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY = Path(__file__).with_name("clip_tokenizer.json")
"""``tools/make_tokenizer.py`` generates it from OpenAI's byte-pair vocabulary. Its licence is in the same folder."""

POSITIONS = 77
START, END = 49406, 49407
TOKENS_PER_CHUNK = POSITIONS - 2
"""Tokens of the prompt in a chunk."""

COMMA = 267
"""The token of a comma that ends a word."""

BACKTRACK = 20
"""Tokens. If one of the last 20 tokens of a full chunk is a comma, the chunk ends after it, as in AUTOMATIC1111."""

MOST_CHUNKS = 32


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens for one call of a text encoder.

    ``ids``: :data:`POSITIONS` token ids.
    ``weights``: weight of each token; None if all are 1.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...] | None


NO_INVERSION_TOKENS: InversionTokens = MappingProxyType({})


@cache
def _tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(VOCABULARY))


@cache
def vocabulary() -> dict[int, str]:
    """Return the text of each token, by its id."""
    return {token: text for text, token in _tokenizer().get_vocab().items()}


def tokens_of(text: str) -> list[int]:
    """Return the token ids of a text, without start and end tokens."""
    return _tokenizer().encode(text, add_special_tokens=False).ids


def token_ids_of_prompt(field: str, text: str, words: Iterable[str]) -> set[int]:
    """Return the token ids of a prompt without those of ``words``.

    Raises RequestError for a prompt that cannot be parsed.
    """
    nothing: InversionTokens = dict.fromkeys(words, ())
    pieces = [piece for span in spans(field, text) for piece in cut(span.text, nothing)]
    return {token for piece in pieces if isinstance(piece, str) for token in tokens_of(piece)}


def chunks(field: str, text: str, pad_id: int, inversion_tokens: InversionTokens = NO_INVERSION_TOKENS) -> list[Chunk]:
    """Split a prompt into chunks, at least one. A text encoder reads them one by one.

    A chunk has a start token, the text, an end token, and ``pad_id`` up to :data:`POSITIONS`.
    The tokens of a word in ``inversion_tokens`` stay together; they start a new chunk if they do not fit.
    Raises RequestError for a prompt that cannot be parsed, or is longer than :data:`MOST_CHUNKS` chunks.
    """
    parts: list[list[tuple[int, float]]] = [[]]
    for span in spans(field, text):
        if span.breaks:
            parts.append([])
        for piece in cut(span.text, inversion_tokens):
            if isinstance(piece, tuple):
                if len(parts[-1]) == TOKENS_PER_CHUNK:
                    parts.append(_carried(parts[-1]))
                if len(parts[-1]) + len(piece) > TOKENS_PER_CHUNK:
                    parts.append([])
                parts[-1] += [(token, span.weight) for token in piece]
                continue
            for token in tokens_of(piece):
                if len(parts[-1]) == TOKENS_PER_CHUNK:
                    # If the next token is a comma, no token moves to the next chunk with it.
                    parts.append([] if token == COMMA else _carried(parts[-1]))
                parts[-1].append((token, span.weight))
    if len(parts) > MOST_CHUNKS:
        raise RequestError(
            field, f"{text[:20]}…", f"has {len(parts)} chunks of {TOKENS_PER_CHUNK} tokens; at most {MOST_CHUNKS}"
        )
    return [_chunk(part, pad_id) for part in parts]


def _carried(full: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Remove from a full chunk the tokens that move to the next: all after its last comma, if that is near its end."""
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
