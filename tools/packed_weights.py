"""Packs weights with bitsandbytes and comfy-kitchen: ``python tools/packed_weights.py tests/data/packed_weights.json``.

It needs both packages (``pip install bitsandbytes comfy-kitchen``). For each form, the file has the bytes of a
safetensors file (base64) and the SHA-256 of the numbers in fp32, as the packages dequantise them. The tests compare.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

SHAPES = {"int8": (24, 128), "int8, rows": (24, 128), "int8, rotated": (24, 128), "int8 of bitsandbytes": (24, 128)}
"""The shapes of weights. Others have :data:`SHAPE`."""

SHAPE = (160, 128)
"""Scales of 160 rows take two of cuBLAS's tiles, and 320 blocks of 64 numbers two groups of nested scales."""

ROTATED = 64


def weights(form: str) -> torch.Tensor:
    """Return the weights that a form packs."""
    shape = SHAPES.get(form, SHAPE)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)) * 0.05


def _settings(**settings: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def _functional() -> Any:
    return importlib.import_module("bitsandbytes.functional")


def _four_bits(kind: str, nested: bool) -> Callable[[torch.Tensor], tuple[dict[str, Any], torch.Tensor]]:
    def pack(values: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor]:
        functional = _functional()
        stored, state = functional.quantize_4bit(values, quant_type=kind, compress_statistics=nested)
        beside = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        return {"weight": stored, **beside}, functional.dequantize_4bit(stored, state)

    return pack


def _eight_bits(values: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor]:
    functional = _functional()
    stored, maxima, _ = functional.int8_vectorwise_quant(values.half())
    beside = {"weight": stored, "SCB": maxima, "weight_format": torch.zeros((), dtype=torch.uint8)}
    return beside, functional.int8_vectorwise_dequant(stored, maxima)


def _comfy(layout: str, form: str, **options: Any) -> Callable[[torch.Tensor], tuple[dict[str, Any], torch.Tensor]]:
    def pack(values: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor]:
        kind: Any = getattr(importlib.import_module("comfy_kitchen.tensor"), layout)
        stored, params = kind.quantize(values, **options)
        named = kind.state_dict_tensors(stored, params)
        rotation = {"convrot": True, "convrot_groupsize": ROTATED} if options.get("convrot") else {}
        # ComfyUI stores exponents as bytes.
        plain = {
            f"weight{end}": part.view(torch.uint8) if part.dtype == torch.float8_e8m0fnu else part
            for end, part in named.items()
        }
        return {**plain, "comfy_quant": _settings(format=form, **rotation)}, kind.dequantize(stored, params)

    return pack


PACKERS: Mapping[str, Callable[[torch.Tensor], tuple[dict[str, Any], torch.Tensor]]] = {
    "nf4": _four_bits("nf4", nested=False),
    "nf4, nested": _four_bits("nf4", nested=True),
    "fp4": _four_bits("fp4", nested=False),
    "int8 of bitsandbytes": _eight_bits,
    "int8": _comfy("TensorWiseINT8Layout", "int8_tensorwise"),
    "int8, rows": _comfy("TensorWiseINT8Layout", "int8_tensorwise", per_channel=True),
    "int8, rotated": _comfy(
        "TensorWiseINT8Layout", "int8_tensorwise", per_channel=True, convrot=True, convrot_groupsize=ROTATED
    ),
    "mxfp8": _comfy("TensorCoreMXFP8Layout", "mxfp8"),
    "nvfp4": _comfy("TensorCoreNVFP4Layout", "nvfp4"),
}


def numbers(form: str) -> tuple[bytes, torch.Tensor]:
    """Return the file that has a form's weight, and the numbers by the package that wrote it."""
    tensors, found = PACKERS[form](weights(form))
    return save({f"layer.{name}": tensor.contiguous() for name, tensor in tensors.items()}), found.float()


def main() -> None:
    made: dict[str, dict[str, str]] = {}
    for form in PACKERS:
        file, found = numbers(form)
        digest = hashlib.sha256(found.numpy().tobytes()).hexdigest()
        made[form] = {"file": base64.b64encode(file).decode(), "numbers": digest}
    Path(sys.argv[1]).write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
