"""Quantises the tensors of a file while it is written, so that memory holds one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from safelight.devices.transfer import DTYPES
from safelight.files import gguf_writing
from safelight.files.blocks import BLOCKS
from safelight.files.header import ITEM_BYTES, TensorInfo
from safelight.files.packing import FORM, FORMS_BY_DTYPE
from safelight.weights.block_decoding import decode
from safelight.weights.quantising import FP8, quantise_blocks, quantise_fp8


@dataclass(frozen=True, slots=True)
class TensorToWrite:
    """A tensor of a file to write.

    ``read``: returns its numbers, in its shape and any dtype.
    ``dtype``: the one that the file has if the tensor is not quantised.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    quantised: bool
    read: Callable[[], torch.Tensor]


@dataclass(slots=True)
class Quantiser:
    """Quantises the tensors of a file one after the other, and adds up their errors.

    ``progress``: called after each tensor with the bytes that are done, and those of all tensors.

    The attribute ``count`` says how many tensors are quantised.
    """

    targets: list[TensorToWrite]
    progress: Callable[[int, int], None] | None
    count: int = 0
    _squares: float = 0.0
    _errors: float = 0.0
    _done: int = 0
    _total: int = 0
    _by_name: dict[str, TensorToWrite] = field(default_factory=dict[str, TensorToWrite])
    _beside: dict[str, bytes] = field(default_factory=dict[str, bytes])

    @property
    def error(self) -> float:
        """The root mean square of the quantised weights' errors, divided by that of the weights."""
        return math.sqrt(self._errors / self._squares) if self._squares else 0.0

    def in_blocks(self, form: str) -> Iterator[TensorInfo]:
        """Yield what the header of a GGUF file lists."""
        for target in self.targets:
            yield self._info(target, form if target.quantised else target.dtype)

    def in_fp8(self) -> Iterator[TensorInfo]:
        """Yield what the header of a safetensors file lists. A weight's scale and form follow it."""
        form = json.dumps({"format": FORMS_BY_DTYPE[FP8]}).encode()
        # With the scale's 4 bytes, 8 or a multiple of it, so that the next tensor begins at one.
        form += b" " * (-(len(form) + ITEM_BYTES["F32"]) % 8)
        for target in self.targets:
            yield self._info(target, FP8 if target.quantised else target.dtype)
            if target.quantised:
                stem = target.name.removesuffix("weight")
                yield TensorInfo(f"{stem}weight_scale", "F32", (), Path(), 0, ITEM_BYTES["F32"])
                self._beside[stem + FORM] = form
                yield TensorInfo(stem + FORM, "U8", (len(form),), Path(), 0, len(form))

    def _info(self, target: TensorToWrite, form: str) -> TensorInfo:
        self._by_name[target.name] = target
        nbytes = gguf_writing.nbytes_of(form, target.shape)
        self._total += nbytes
        return TensorInfo(target.name, form, target.shape, Path(), 0, nbytes)

    def bytes_of(self, info: TensorInfo) -> bytes:
        """Return the bytes of a tensor in its form."""
        if info.name in self._beside:
            return self._beside.pop(info.name)
        target = self._by_name[info.name]
        values = target.read()
        plain = values.to(DTYPES[info.dtype]) if not target.quantised else values.float().contiguous()
        data = self._quantised(info, plain) if target.quantised else _bytes(plain)
        self._done += len(data)
        if self.progress is not None:
            self.progress(self._done, self._total)
        return data

    def _quantised(self, info: TensorInfo, values: torch.Tensor) -> bytes:
        if info.dtype in BLOCKS:
            raw = quantise_blocks(info.dtype, values)
            back = torch.empty(values.numel())
            decode(info.dtype, raw, back)
        else:
            raw, scale = quantise_fp8(values)
            back = raw.float().mul_(scale).view(-1)
            stem = info.name.removesuffix("weight")
            self._beside[f"{stem}weight_scale"] = _bytes(torch.tensor(scale, dtype=torch.float32))
        self.count += 1
        self._squares += values.double().square().sum().item()
        self._errors += (back - values.view(-1)).double().square().sum().item()
        return _bytes(raw)


def _bytes(values: torch.Tensor) -> bytes:
    return values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
