"""The files of a diffusers folder besides the tensors: configurations, class names, the tokenizer."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safelight.boundary.modules import is_clip


def settings_of(module: Any) -> dict[str, Any]:
    """Return the ``config.json`` values of a module's folder."""
    transformers = hasattr(module.config, "to_dict")
    settings = module.config.to_dict() if transformers else dict(module.config)
    name = {"architectures": [type(module).__name__]} if transformers else {}
    return json.loads(json.dumps({**settings, **name, "_class_name": type(module).__name__}, default=str))


def published_name(module: Any, name: str) -> str:
    """Return the name of a module's tensor in published checkpoints.

    Before transformers 5 a CLIP text encoder had one more module around it. A program with an older version would
    ignore unknown names and compute with random weights without a word.
    """
    inner = is_clip(module) and name.startswith(("embeddings.", "encoder.layers.", "final_layer_norm."))
    return f"text_model.{name}" if inner else name


def library_of(module: Any) -> str:
    """Return the library of a module, as in the folder's index."""
    return "transformers" if hasattr(module.config, "to_dict") else "diffusers"


def save_tokenizer(folder: Path, vocabulary: Path, pad: str) -> None:
    """Save CLIP's tokenizer to ``folder`` in transformers' format. ``vocabulary``: a ``tokenizer.json`` file."""
    clip_tokenizer(vocabulary, pad).save_pretrained(folder)
    # transformers 4 reads these two files.
    model, merges = _vocabulary(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(model, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")


def save_t5_tokenizer(folder: Path, tokenizer: str, length: int) -> None:
    """Save T5's tokenizer to ``folder`` in transformers' format.

    ``tokenizer``: the content of a ``tokenizer.json`` file.
    ``length``: tokens of a prompt, padding included.
    """
    tokens = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "model_max_length": length, **tokens}
    save_tokenizer_file(folder, tokenizer, settings)


def save_tokenizer_file(folder: Path, tokenizer: str, settings: Mapping[str, Any]) -> None:
    """Save a tokenizer to ``folder`` in transformers' format.

    ``tokenizer``: the content of a ``tokenizer.json`` file.
    ``settings``: of ``tokenizer_config.json``.
    """
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(tokenizer)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def clip_tokenizer(vocabulary: Path, pad: str) -> Any:
    """Create transformers' CLIP tokenizer. ``vocabulary``: a ``tokenizer.json`` file. ``pad``: the padding token."""
    from transformers.models.clip import tokenization_clip

    kind: Any = tokenization_clip.CLIPTokenizer
    if "vocab" in inspect.signature(kind).parameters:
        model, merges = _vocabulary(vocabulary)
        return kind(vocab=model, merges=merges, model_max_length=77, pad_token=pad)
    # In transformers 4 the class of this name is written in Python and can differ in rare texts.
    from transformers.models.clip.tokenization_clip_fast import CLIPTokenizerFast  # pyright: ignore[reportMissingImports]

    fast: Any = CLIPTokenizerFast
    return fast(tokenizer_file=str(vocabulary), model_max_length=77, pad_token=pad)


def _vocabulary(file: Path) -> tuple[dict[str, int], list[tuple[str, ...]]]:
    """Return the ids and the merges of a ``tokenizer.json`` file."""
    model = json.loads(file.read_text())["model"]
    return model["vocab"], [
        tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]
    ]
