"""Weights that bitsandbytes and comfy-kitchen packed have the numbers that these programs compute, bit for bit."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.packed_files import PACKERS, as_tensor, pack, packed_in, stored_bytes
from support.scale import thinned

from safelight.devices.transfer import CHUNK_ELEMENTS, Read, read_all
from safelight.errors import IntegrityError
from safelight.weights import manifest
from safelight.weights.block_decoding import decoding_of, dequantise
from safelight.weights.digest import TensorDigester
from safelight.weights.layout import TensorLocation
from safelight.weights.manifest import ManifestTensor
from safelight.weights.packed_decoding import rotate_groups

HOME = Path(__file__).parents[2]
sys.path.insert(0, str(HOME / "tools"))

import packed_weights  # noqa: E402

WRITTEN = json.loads((HOME / "tests/data/packed_weights.json").read_text())


def both_ways(tensor: ManifestTensor) -> torch.Tensor:
    """Dequantise while the file is read, and from memory."""
    read_target, target = torch.empty(tensor.shape), torch.empty(tensor.shape)
    blocks = decoding_of(tensor.dtype, tensor.packing, tensor.nbytes, target.numel())
    read_all(
        [
            Read(
                "w",
                tensor.path,
                tensor.offset,
                tensor.nbytes,
                tensor.dtype,
                False,
                tensor.xxh3,
                read_target,
                blocks=blocks,
                beside=tensor.beside,
            )
        ],
        1,
    )
    dequantise(tensor, stored_bytes(tensor), target)
    assert torch.equal(read_target.view(torch.int32), target.view(torch.int32))
    return target


@pytest.mark.parametrize("form", WRITTEN)
def test_the_numbers_are_those_of_the_program_that_wrote_them(form: str, tmp_path: Path) -> None:
    path = tmp_path / "packed.safetensors"
    path.write_bytes(base64.b64decode(WRITTEN[form]["file"]))
    info = packed_in(path)
    right = packed_weights.weights(form)
    assert (info.name, info.shape) == ("layer.weight", tuple(right.shape))
    found = both_ways(as_tensor(info))
    assert (found - right).norm() / right.norm() < (0.13 if "4" in form else 0.03)
    if form == "int8, rotated":
        # comfy-kitchen multiplies matrices, so the last bits differ.
        assert (found - rotated_by_a_matrix(found, packed_weights.ROTATED)).abs().max() > 0.01
        return
    assert hashlib.sha256(found.numpy().tobytes()).hexdigest() == WRITTEN[form]["numbers"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.rand(6, 1) + 0.5], ids=["whole", "rows"])
def test_plain_numbers_may_have_scales(dtype: torch.dtype, scale: torch.Tensor, tmp_path: Path) -> None:
    stored = torch.randn(6, 7).to(dtype)
    save_file({"layer.weight": stored, "layer.weight_scale": scale}, tmp_path / "scaled.safetensors")
    found = both_ways(as_tensor(packed_in(tmp_path / "scaled.safetensors")))
    assert torch.equal(found, stored.float() * scale)


def test_a_large_scale_of_fp8_gives_finite_numbers(tmp_path: Path) -> None:
    stored = torch.full((4, 8), 2.0**-9).to(torch.float8_e4m3fn)
    save_file({"layer.weight": stored, "layer.weight_scale": torch.tensor(2e36)}, tmp_path / "large.safetensors")
    found = both_ways(as_tensor(packed_in(tmp_path / "large.safetensors")))
    assert torch.equal(found, stored.float() * torch.tensor(2e36))


def test_halves_in_another_order_are_other_content(tmp_path: Path) -> None:
    packed = pack("layer.weight", torch.randn(64, 128, generator=torch.Generator().manual_seed(1)), "int8, rows")
    assert packed is not None
    save_file({name: one.contiguous() for name, one in packed[0].items()}, tmp_path / "rows.safetensors")
    info = packed_in(tmp_path / "rows.safetensors")
    digests: set[str] = set()
    for swap in (False, True):
        place = TensorLocation(
            "w", info.dtype, info.shape, info.path, info.offset, info.nbytes, packing=info.packing, swap_halves=swap
        )
        with info.path.open("rb") as file:
            digester = TensorDigester()
            manifest._hash_packing(place, {info.path: file.fileno()}, digester)
        digests.add(digester.blake3.hexdigest())
    assert len(digests) == 2


def rotated_by_a_matrix(values: torch.Tensor, size: int) -> torch.Tensor:
    """Multiply by ConvRot's matrix as comfy-kitchen builds it."""
    seed = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64)
    matrix = seed
    while len(matrix) < size:
        matrix = torch.kron(matrix, seed)
    wide = values.double().reshape(len(values), -1, size)
    return (wide @ (matrix / size**0.5)).reshape(values.shape).float()


@pytest.mark.parametrize("size", [4, 16, 64, 256, 1024])
def test_a_rotation_is_the_product_with_the_matrix(size: int) -> None:
    values = torch.randn(5, 2 * size, generator=torch.Generator().manual_seed(1))
    found = values.clone()
    rotate_groups(found, size)
    assert torch.allclose(found, rotated_by_a_matrix(values, size), atol=2e-6)
    rotate_groups(found, size)
    assert torch.allclose(found, values, atol=4e-6)


@pytest.mark.full
@pytest.mark.parametrize("form", WRITTEN)
def test_the_programs_still_write_the_same(form: str) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("comfy_kitchen")
    file, numbers = packed_weights.numbers(form)
    # Settings may have new keys; the numbers may not differ.
    assert hashlib.sha256(numbers.numpy().tobytes()).hexdigest() == WRITTEN[form]["numbers"]
    assert len(file) >= 0.9 * len(base64.b64decode(WRITTEN[form]["file"]))


@pytest.mark.parametrize("form", thinned(PACKERS, 4))
def test_more_rows_than_a_chunk_has(form: str, tmp_path: Path) -> None:
    """Each chunk finds its own scales, also on several threads."""
    values = torch.randn(700, 1024, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 3, 700)[:, None]
    assert values.numel() > CHUNK_ELEMENTS
    packed = pack("layer.weight", values, form)
    assert packed is not None
    save_file(packed[0], tmp_path / "packed.safetensors")
    tensor = as_tensor(packed_in(tmp_path / "packed.safetensors"))
    assert torch.equal(both_ways(tensor), packed[1])


def test_a_changed_scale_is_found(tmp_path: Path) -> None:
    packed = pack("layer.weight", torch.randn(64, 64), "int8, rows")
    assert packed is not None
    path = tmp_path / "packed.safetensors"
    save_file(packed[0], path)
    tensor = as_tensor(packed_in(path))
    data = bytearray(path.read_bytes())
    data[tensor.beside[0].offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"layer\.weight_scale"):
        stored_bytes(tensor)
