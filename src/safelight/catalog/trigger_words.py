"""Finds the words that call a LoRA: in its metadata, and in the files that other programs put beside it.

- ``NAME.civitai.info``: Civitai's answer about a version (Civitai Helper, Safelight's downloads)
- ``NAME.json``: AUTOMATIC1111's and Forge's own notes
- ``NAME.metadata.json``: ComfyUI-Lora-Manager's
- ``NAME.cm-info.json``: Stability Matrix's
- ``NAME.swarm.json``: SwarmUI's, with the keys of modelspec (https://github.com/Stability-AI/ModelSpec)
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from safelight.errors import FileError
from safelight.files.disk import open_regular

MODELSPEC = "modelspec.trigger_phrase"

MOST_BYTES = 8 << 20
"""A larger file beside a LoRA is none of these."""

ENDINGS = (".civitai.info", ".json", ".metadata.json", ".cm-info.json", ".swarm.json")


def find(path: Path, metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Return the words of a LoRA, each once. ``metadata``: that of its header."""
    found = _split(metadata.get(MODELSPEC))
    for ending in ENDINGS:
        beside = path.with_name(path.stem + ending)
        with contextlib.suppress(FileError, ValueError, RecursionError):
            found += _words(json.loads(_read(beside)))
    return tuple(dict.fromkeys(found))


def _read(path: Path) -> bytes:
    descriptor, size = open_regular(path)
    with open(descriptor, "rb") as file:
        return file.read() if size <= MOST_BYTES else b""


def _words(said: Any) -> list[str]:
    if not isinstance(said, dict):
        return []
    values = cast("dict[str, Any]", said)
    inner: Any = values.get("civitai")
    listed: Any = values.get("trainedWords") or values.get("TrainedWords")
    if not listed and isinstance(inner, dict):
        listed = cast("dict[str, Any]", inner).get("trainedWords")
    words = [str(one) for one in cast("list[Any]", listed)] if isinstance(listed, list) else []
    found = [word for one in words for word in _split(one)]
    return found or _split(values.get("activation text")) or _split(values.get(MODELSPEC))


def _split(said: object) -> list[str]:
    return cleaned(said.split(",")) if isinstance(said, str) else []


def cleaned(words: Iterable[str]) -> list[str]:
    """Return the words that can be in a prompt."""
    return [word.strip() for word in words if word.strip() and word.isprintable()]
