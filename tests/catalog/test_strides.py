"""Pickled tensors of every stride become the weights that they are, in every kind of file that is converted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import adapters, checkpoints, controls
from support.scale import thinned

from safelight.catalog.adapters import Adapters
from safelight.catalog.library import Library

Odd = Callable[[torch.Tensor], torch.Tensor]

STRIDES: dict[str, Odd] = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda t: t[:1].expand(t.shape),
    "a part of columns": lambda t: torch.cat([t, t * 2], -1)[..., : t.shape[-1]],
    "each second row": lambda t: torch.stack([t, t * 2], 1).flatten(0, 1)[::2],
    "a slice that is contiguous": lambda t: torch.cat([t * 2, t])[t.shape[0] :],
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t.t(),
}


def _odd(tensors: dict[str, torch.Tensor], odd: Odd) -> dict[str, torch.Tensor]:
    def one(tensor: torch.Tensor) -> torch.Tensor:
        made = odd(tensor) if tensor.ndim >= 2 else tensor
        return made if made.shape == tensor.shape else tensor.t().contiguous().t()

    return {name: one(tensor) for name, tensor in tensors.items()}


def _files(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    vae = load_file(checkpoints.write_single(folder / "whole.safetensors", "sd1"))
    prefix = "first_stage_model."
    return {
        "lora": adapters.lora("sd1", 1, adapters.kohya),
        "embedding": {"emb_params": controls.vectors(3)},
        "vae": {name.removeprefix(prefix): t for name, t in vae.items() if name.startswith(prefix)},
        "controlnet": load_file(controls.write(folder / "net.safetensors")),
    }


@pytest.mark.parametrize("kind", thinned(["lora", "vae", "embedding", "controlnet"], 2))
def test_adapters_of_every_stride_are_what_they_are(kind: str, tmp_path: Path) -> None:
    tensors = _files(tmp_path)[kind]
    for label, odd in STRIDES.items():
        changed = _odd(tensors, odd)
        assert kind == "vae" or label.startswith("a slice") or any(not t.is_contiguous() for t in changed.values())
        library = Adapters(tmp_path / label)
        torch.save(changed, tmp_path / "odd.pt")
        save_file({name: t.contiguous() for name, t in changed.items()}, tmp_path / "plain.safetensors")
        odd_one, plain = (library.add(tmp_path / name) for name in ("odd.pt", "plain.safetensors"))
        content = [{(t.name, t.dtype, t.shape, t.xxh3) for t in one.component.tensors} for one in (odd_one, plain)]
        assert content[0] == content[1], label


@pytest.mark.parametrize("label", thinned(STRIDES, 3))
def test_checkpoints_of_every_stride_are_what_they_are(label: str, tmp_path: Path) -> None:
    tensors = load_file(checkpoints.write_single(tmp_path / "whole.safetensors", "sd2", dtype=torch.float16))
    changed = _odd(tensors, STRIDES[label])
    torch.save({"state_dict": changed}, tmp_path / "odd.ckpt")
    save_file({name: t.contiguous() for name, t in changed.items()}, tmp_path / "plain.safetensors")
    library = Library(tmp_path / "root")
    assert library.add(tmp_path / "odd.ckpt").digest == library.add(tmp_path / "plain.safetensors").digest
