"""Tokenizers of text encoders: the ones that are a part of Safelight, and the ones of checkpoints. No torch here.

A checkpoint's own tokenizer counts. If it gives the same tokens as Safelight's, nothing is recorded of it. So a text
encoder is the same component, whether its file came with a tokenizer or without.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safelight.errors import UnsupportedModelError
from safelight.files.disk import read_file
from safelight.logs import Log

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_log = Log(__name__)


@dataclass(frozen=True, slots=True)
class TokenizerContent:
    """The content of a checkpoint's own tokenizer file. Two of them are equal if their digests are.

    ``digest``: BLAKE3 in hex.
    """

    digest: str
    data: bytes = field(compare=False)


@dataclass(frozen=True, slots=True)
class ShippedTokenizer:
    """A tokenizer that is a part of Safelight.

    ``name``: of the text encoder, for errors.
    ``path``: a ``tokenizer.json`` of the package tokenizers; with the suffix ``.gz``, compressed by gzip.
    ``end``: the id from which the file's added tokens are left out; None if there are none to leave out.
    ``fixed``: tokens with the ids that the family's code contains. A checkpoint's own tokenizer must have the same.
    ``replaceable``: whether the family can compute with another tokenizer. If not, only vocabularies are compared.
    """

    name: str
    path: Path
    end: int | None = None
    fixed: tuple[tuple[str, int], ...] = ()
    replaceable: bool = True

    def read(self) -> str:
        """Return the content of its ``tokenizer.json``."""
        data = self.path.read_bytes()
        text = (gzip.decompress(data) if self.path.suffix == ".gz" else data).decode()
        if self.end is None:
            return text
        values = json.loads(text)
        values["added_tokens"] = [one for one in values["added_tokens"] if one["id"] < self.end]
        return json.dumps(values)


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """Where a checkpoint has the tokenizer of a text encoder: a ``tokenizer.json`` of the package tokenizers.

    ``place``: its path in a diffusers folder.
    ``source``: where it comes from, for the error of a checkpoint without it; "" for a shipped tokenizer.
    ``shipped``: the one that counts if the checkpoint has none; None if Safelight has none either.
    """

    place: str
    source: str = ""
    shipped: ShippedTokenizer | None = None

    def candidates(self, weights: Path) -> tuple[Path, ...]:
        """Return where the file may be, the best place first. ``weights``: a diffusers folder, or a file of weights."""
        if weights.is_dir():
            return (weights / self.place,)
        if self.shipped is not None and not self.shipped.replaceable:
            # A file may have two text encoders, and the tokenizer beside it is that of the other one.
            return ()
        name = Path(self.place).name
        named = weights.parent / f"{weights.stem}.{name}"
        # Beside files of several text encoders, a file that is named after none of them may be of another one.
        return (named,) if self.shipped is not None else (named, weights.parent / name, weights.parent / self.place)

    def own(self, weights: Path) -> Path | None:
        """Return the path of the checkpoint's own tokenizer. None if Safelight's gives the same tokens.

        ``weights``: as in :meth:`candidates`.
        Raises UnsupportedModelError if there is no tokenizer, or one that cannot be used.
        """
        places = self.candidates(weights)
        found = next((place for place in places if place.is_file()), None)
        if self.shipped is None:
            if found is None:
                missing = " or ".join(map(str, places))
                problem = f"has no tokenizer: put {missing} there, which comes from {self.source}"
                raise UnsupportedModelError(weights, problem)
            return found
        if found is None or not self.shipped.replaceable:
            if weights.is_dir():
                _check_vocabulary(found or places[0].with_name("vocab.json"), self.shipped)
            return None
        text = read_file(found)
        if text == _shipped_bytes(self.shipped):
            return None
        own = _load(found, text)
        if _meaning(own) == _shipped_meaning(self.shipped):
            return None
        _check_replacement(found, own, self.shipped)
        return found


def _load(path: Path, data: bytes) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(data.decode())
    except Exception as error:  # The package raises Exception itself.
        raise UnsupportedModelError(path, f"is no tokenizer.json that can be read: {error}") from error


def _check_replacement(path: Path, own: Tokenizer, shipped: ShippedTokenizer) -> None:
    """Raise UnsupportedModelError if a family's code and a tokenizer that differs from Safelight's do not agree."""
    for token, right in shipped.fixed:
        if (number := own.token_to_id(token)) != right:
            problem = f"gives {token} the id {number}; a tokenizer for {shipped.name} must give it {right}"
            raise UnsupportedModelError(path, problem)


def _check_vocabulary(path: Path, shipped: ShippedTokenizer) -> None:
    """Compare a vocabulary with Safelight's, and raise UnsupportedModelError if they differ.

    The ids of a byte-pair vocabulary are in the order of its merges, so these are the same if the vocabulary is.
    ``path``: a ``tokenizer.json``, or ``vocab.json`` of transformers' older form. There may be none.
    """
    if not path.is_file():
        return
    try:
        values: Any = json.loads(read_file(path))
        own = values["model"]["vocab"] if path.name == "tokenizer.json" else values
        added = _added_tokens(path, values)
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedModelError(path, f"is no vocabulary that can be read ({error!r})") from error
    right: dict[str, int] = json.loads(shipped.read())["model"]["vocab"]
    if own != right:
        remedy = f"put a tokenizer.json into {path.parent}" if shipped.replaceable else "no other one is supported"
        raise UnsupportedModelError(path, f"differs from the vocabulary of {shipped.name}; {remedy}")
    unknown = [token for token in added if token not in right]
    if unknown and not shipped.replaceable:
        _log.warning("prompts are read without the tokens that this tokenizer adds", file=str(path), tokens=unknown)


def _added_tokens(path: Path, values: Any) -> list[str]:
    """Return the tokens that a tokenizer has besides its vocabulary. ``values``: the content of ``path``."""
    if path.name == "tokenizer.json":
        return [one["content"] for one in values["added_tokens"]]
    beside = path.with_name("added_tokens.json")
    return list(json.loads(read_file(beside))) if beside.is_file() else []


@lru_cache(maxsize=4)
def _shipped_bytes(shipped: ShippedTokenizer) -> bytes:
    return shipped.read().encode()


@lru_cache(maxsize=4)
def _shipped_meaning(shipped: ShippedTokenizer) -> Any:
    return _meaning(_load(shipped.path, _shipped_bytes(shipped)))


def _meaning(tokenizer: Tokenizer) -> Any:
    """Return everything that decides which tokens a text has. The package writes older files in its present form."""
    values: dict[str, Any] = json.loads(tokenizer.to_str())
    kept = ("id", "content", "lstrip", "rstrip", "single_word")
    added = [[one[key] for key in kept] for one in values["added_tokens"]]
    return _without_offsets([values["model"], values["normalizer"], values["pre_tokenizer"], sorted(added)])


def _without_offsets(value: Any) -> Any:
    """Return JSON values without the settings that change no token. An empty text means the same as none."""
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value).items()
        return {key: _without_offsets(one) for key, one in items if key != "trim_offsets"}
    if isinstance(value, list):
        return [_without_offsets(one) for one in cast("list[Any]", value)]
    return value or None if value == "" else value
