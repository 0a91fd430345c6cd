"""The files of a diffusers folder besides the tensors: configurations, class names, the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def settings_of(module: Any) -> dict[str, Any]:
    """Return the ``config.json`` values of a module's folder."""
    transformers = hasattr(module.config, "to_dict")
    settings = module.config.to_dict() if transformers else dict(module.config)
    name = {"architectures": [type(module).__name__]} if transformers else {}
    return json.loads(json.dumps({**settings, **name, "_class_name": type(module).__name__}, default=str))


def library_of(module: Any) -> str:
    """Return the library of a module, as in the folder's index."""
    return "transformers" if hasattr(module.config, "to_dict") else "diffusers"


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
