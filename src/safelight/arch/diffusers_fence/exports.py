"""The files of a diffusers folder besides the tensors: configurations, class names, the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch

from safelight.arch.diffusers_fence.modules import construct
from safelight.formats.keys.clip import CLIPConfig
from safelight.formats.layout import ComponentConfig


def settings_of(base: str, config: ComponentConfig) -> dict[str, Any]:
    """Return the ``config.json`` values of a component's folder."""
    with torch.device("meta"):
        module = cast("Any", construct(base, config))
    settings = module.config.to_dict() if isinstance(config, CLIPConfig) else dict(module.config)
    name = {"architectures": [type(module).__name__]} if isinstance(config, CLIPConfig) else {}
    return json.loads(json.dumps({**settings, **name, "_class_name": type(module).__name__}, default=str))


def class_name(base: str, config: ComponentConfig) -> str:
    """Return a component's class name, as in the folder's index."""
    with torch.device("meta"):
        return type(construct(base, config)).__name__


def save_tokenizer(folder: Path, vocabulary: Path, pad: str) -> None:
    """Save CLIP's tokenizer to ``folder`` in transformers' format. ``vocabulary``: a ``tokenizer.json`` file."""
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    model = json.loads(vocabulary.read_text())["model"]
    merges: Any = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    tokenizer = CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=77, pad_token=pad)
    tokenizer.save_pretrained(folder)
    # Older versions of transformers read these two files.
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
