"""A starter with other content: a model that no installation and no machine of a cluster has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from safelight.catalog import starters


def write_changed_starter(path: Path) -> None:
    """Write a starter, one of whose tensors is a little larger."""
    source = next(model for model in starters.models() if model.name == "starter-noto").path
    tensors = load_file(source)
    name = next(name for name in sorted(tensors) if name.endswith("bias"))
    tensors[name] = tensors[name] * np.asarray(1.001, tensors[name].dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
