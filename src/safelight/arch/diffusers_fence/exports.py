"""What diffusers' folders say beside their tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch

from safelight.arch.diffusers_fence.modules import construct
from safelight.formats.keys.clip import CLIPConfig
from safelight.formats.layout import ComponentConfig


def settings_of(base: str, config: ComponentConfig) -> dict[str, Any]:
    """What the ``config.json`` of a component's folder says."""
    with torch.device("meta"):
        module = cast("Any", construct(base, config))
    settings = module.config.to_dict() if isinstance(config, CLIPConfig) else dict(module.config)
    name = {"architectures": [type(module).__name__]} if isinstance(config, CLIPConfig) else {}
    return json.loads(json.dumps({**settings, **name, "_class_name": type(module).__name__}, default=str))


def class_name(base: str, config: ComponentConfig) -> str:
    """The class of a component, as a folder's index names it."""
    with torch.device("meta"):
        return type(construct(base, config)).__name__


def save_tokenizer(folder: Path, vocabulary: Path, pad: str) -> None:
    """CLIP's tokenizer as transformers keeps it, from a ``tokenizer.json``."""
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    model = json.loads(vocabulary.read_text())["model"]
    merges: Any = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    made = CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=77, pad_token=pad)
    made.save_pretrained(folder)
    # Older versions of transformers read these two.
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
