"""Writes files with quantised tensors, in every form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from support import gguf_files
from support.families import TinyFamily
from support.packed_files import PACKERS, pack

from safelight.catalog.catalog import Catalog
from safelight.catalog.model import Model
from safelight.files.blocks import BLOCKS

FP8 = {"fp8 e4m3": torch.float8_e4m3fn, "fp8 e5m2": torch.float8_e5m2}
SCALED = ("scaled fp8, older names", "scaled fp8, newer names")

Tensors = Mapping[str, torch.Tensor]


def write_compact(path: Path, tensors: Tensors, form: str) -> tuple[Path, Tensors]:
    """Write a file in a form. Returns its path and its numbers in fp32.

    Norms, biases and other vectors stay as they are, as in published files.
    """
    if form in BLOCKS or form == "F16":
        generator = np.random.default_rng(len(tensors))
        stored = {name: gguf_files.stored(form, tensor, generator) for name, tensor in tensors.items()}
        gguf_files.write(path.with_suffix(".gguf"), stored)
        return path.with_suffix(".gguf"), {name: gguf_files.dequantized(one) for name, one in stored.items()}
    if form in PACKERS:
        return _write_packed(path, tensors, form)
    scaled, newer = form in SCALED, form == SCALED[1]
    dtype = FP8.get(form, torch.float8_e4m3fn)
    written: dict[str, torch.Tensor] = {}
    numbers: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            written[name] = numbers[name] = tensor.float()
            continue
        scale = tensor.float().abs().max() / 448 if scaled and name.endswith("weight") else None
        written[name] = (tensor.float() if scale is None else tensor.float() / scale).to(dtype)
        numbers[name] = written[name].float() if scale is None else written[name].float() * scale
        if scale is not None:
            stem = name.removesuffix("weight")
            written[stem + ("weight_scale" if newer else "scale_weight")] = scale
            written[stem + ("input_scale" if newer else "scale_input")] = torch.ones(())
            if newer:
                text = json.dumps({"format": "float8_e4m3fn"}).encode()
                written[stem + "comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    if scaled and not newer:
        prefix = next(iter(tensors)).partition("diffusion_model.")
        written[f"{prefix[0]}{prefix[1]}scaled_fp8" if prefix[1] else "scaled_fp8"] = torch.zeros(2).to(dtype)
    save_file(written, path)
    return path, numbers


def _write_packed(path: Path, tensors: Tensors, form: str) -> tuple[Path, Tensors]:
    written: dict[str, torch.Tensor] = {}
    numbers: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        packed = pack(name, tensor, form)
        if packed is None:
            written[name] = numbers[name] = tensor.float()
        else:
            written |= packed[0]
            numbers[name] = packed[1]
    save_file(written, path)
    return path, numbers


def write_both(tiny_family: TinyFamily, place: Path, form: str, seed: int) -> dict[str, dict[str, Path]]:
    """Write a family's files in a form, and the same numbers in fp32. Returns the paths by role. The VAE is shared."""
    (place / form).mkdir()
    (place / "fp32").mkdir()
    found: dict[str, dict[str, Path]] = {form: {}, "fp32": {}}
    for role, path in tiny_family.write_files(place / "files", seed).items():
        if role == tiny_family.family.vae:
            found[form][role] = found["fp32"][role] = path
            continue
        found[form][role], numbers = write_compact(place / form / path.name, load_file(path), form)
        found["fp32"][role] = place / "fp32" / path.name
        save_file(dict(numbers), found["fp32"][role])
        for tokenizer in path.parent.glob("tokenizer.json"):
            for one in (form, "fp32"):
                (place / one / "tokenizer.json").write_text(tokenizer.read_text())
    return found


def add(root: Path, tiny_family: TinyFamily, files: Mapping[str, Path]) -> Model:
    catalog = Catalog.under(root)
    for role, path in files.items():
        if role != tiny_family.family.denoiser:
            catalog.adapters.add(path)
    return catalog.library.add(files[tiny_family.family.denoiser], "tiny", variant=tiny_family.variant)
