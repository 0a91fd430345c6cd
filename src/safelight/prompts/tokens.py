"""CLIP's tokenizer: text to token ids, from the file that ships with Safelight."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

VOCABULARY = Path(__file__).with_name("clip_tokenizer.json")
"""Made by ``tools/make_tokenizer.py`` from OpenAI's byte-pair vocabulary; its licence is beside it."""

POSITIONS = 77
START, END = 49406, 49407


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(VOCABULARY))


def token_ids(text: str, pad_id: int, positions: int = POSITIONS) -> tuple[list[int], int]:
    """(ids, how many tokens were cut off): start token, text, end token, and ``pad_id`` up to ``positions``."""
    inner = _tokenizer().encode(text, add_special_tokens=False).ids
    room = positions - 2
    ids = [START, *inner[:room], END]
    return ids + [pad_id] * (positions - len(ids)), max(0, len(inner) - room)
