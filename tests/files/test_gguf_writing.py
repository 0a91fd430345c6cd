"""GGUF files that Safelight writes are read by Safelight and by the package gguf."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFReader
from support.gguf_files import kind_of

from safelight.files import gguf, gguf_writing
from safelight.files.header import TensorInfo

SHAPES = {"a.weight": ("Q4_0", (3, 64)), "b.bias": ("F32", (5,)), "c": ("F16", (2, 3, 1, 1)), "d": ("BF16", (7, 2))}


def test_both_read_the_same(tmp_path: Path) -> None:
    path = tmp_path / "some.gguf"
    infos = [
        TensorInfo(name, form, shape, Path(), 0, gguf_writing.nbytes_of(form, shape))
        for name, (form, shape) in SHAPES.items()
    ]
    data = {info.name: np.random.default_rng(1).integers(0, 60, info.nbytes, np.uint8).tobytes() for info in infos}
    metadata: dict[str, str | int] = {"general.architecture": "flux", "general.file_type": 2, "text": "été"}
    with path.open("wb") as file:
        gguf_writing.write(file, metadata, infos, lambda info: data[info.name])
    header = gguf.read_header(path)
    assert dict(header.metadata) == {key: str(value) for key, value in metadata.items()}
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == SHAPES
    whole = path.read_bytes()
    assert all(whole[one.offset : one.offset + one.nbytes] == data[name] for name, one in header.tensors.items())
    theirs = GGUFReader(path)
    for tensor in theirs.tensors:
        form, shape = SHAPES[tensor.name]
        assert (tensor.tensor_type, tuple(tensor.shape[::-1])) == (kind_of(form), shape)
        assert tensor.data.tobytes() == data[tensor.name]
