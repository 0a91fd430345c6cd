"""Finds the words that call a LoRA: in its metadata, and in the files that other programs put beside it.

- ``NAME.civitai.info``: Civitai's answer about a version (Civitai Helper, Safelight's downloads)
- ``NAME.json``: AUTOMATIC1111's and Forge's own notes
- ``NAME.metadata.json``: ComfyUI-Lora-Manager's
- ``NAME.cm-info.json``: Stability Matrix's
- ``NAME.swarm.json``: SwarmUI's, with the keys of modelspec (https://github.com/Stability-AI/ModelSpec)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safelight.errors import FileError
from safelight.files.disk import read_file
from safelight.files.json_values import json_list, json_object

MODELSPEC = "modelspec.trigger_phrase"

MOST_BYTES = 8 << 20
"""A larger file beside a LoRA is none of these."""

ENDINGS = (".civitai.info", ".json", ".metadata.json", ".cm-info.json", ".swarm.json")


def find(path: Path, metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Return the words of a LoRA, each once. ``metadata``: that of its header."""
    found = _split(metadata.get(MODELSPEC))
    for ending in ENDINGS:
        beside = path.with_name(path.stem + ending)
        with contextlib.suppress(FileError):
            found += _words(json_object(read_file(beside, MOST_BYTES)))
    return tuple(dict.fromkeys(found))


def _words(values: Mapping[str, Any]) -> list[str]:
    """Return the words that a file beside a LoRA says."""
    said = values.get("trainedWords") or values.get("TrainedWords")
    listed = json_list(said) or json_list(json_object(values.get("civitai")).get("trainedWords"))
    found = [word for one in listed for word in _split(str(one))]
    return found or _split(values.get("activation text")) or _split(values.get(MODELSPEC))


def _split(said: object) -> list[str]:
    return cleaned(said.split(",")) if isinstance(said, str) else []


def cleaned(words: Iterable[str]) -> list[str]:
    """Return the words that can be in a prompt."""
    return [word.strip() for word in words if word.strip() and word.isprintable()]
