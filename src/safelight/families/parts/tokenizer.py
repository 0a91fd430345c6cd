"""Loads the tokenizers of text encoders, and checks their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from tokenizers import Tokenizer

from safelight.errors import InputError
from safelight.families.tokenizer_file import ShippedTokenizer, TokenizerContent


def content(shipped: ShippedTokenizer | None, own: TokenizerContent | None) -> str:
    """Return the ``tokenizer.json`` of a tokenizer. ``own``: that of the checkpoint; None for ``shipped``."""
    if own is not None:
        return own.data.decode()
    assert shipped is not None, "every checkpoint of this family has a tokenizer"
    return shipped.read()


@lru_cache(maxsize=4)
def load(shipped: ShippedTokenizer | None, own: TokenizerContent | None) -> Tokenizer:
    """Return a tokenizer, without padding and truncation. The last ones are cached. Arguments as in :func:`content`."""
    found = Tokenizer.from_str(content(shipped, own))
    found.no_padding()
    found.no_truncation()
    return found


def check(ids: Sequence[int], rows: int, table: str) -> None:
    """Raise InputError for a token that a text encoder does not have.

    ``rows``: of its table of embeddings.
    ``table``: the table's name.
    """
    if max(ids) >= rows:
        problem = f"its tokenizer gives the token {max(ids)}, and {table} of its text encoder has {rows} rows"
        raise InputError(f"{problem}: the tokenizer is that of another checkpoint")
