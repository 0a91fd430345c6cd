"""Reading, hashing and casting in one pass gives the bits of torch's own cast, at aligned addresses."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.devices import cpu, transfer
from safelight.devices.base import ALIGNMENT, aligned
from safelight.devices.pool import SlabPool
from safelight.errors import IntegrityError

CPU = cpu.CPU()
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write(path: Path, tensor: torch.Tensor, before: int = 3) -> tuple[int, int, str]:
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    path.write_bytes(b"x" * before + data)
    return before, len(data), xxhash.xxh3_128(data).hexdigest()


@pytest.mark.parametrize("source", list(NAMES))
@pytest.mark.parametrize("goal", list(NAMES))
@pytest.mark.parametrize("transpose", [False, True])
def test_bits_are_those_of_torch(source: torch.dtype, goal: torch.dtype, transpose: bool, tmp_path: Path) -> None:
    stored = torch.randn(700, 900, generator=torch.Generator().manual_seed(0)).to(source)
    offset, nbytes, digest = write(tmp_path / "w", stored)
    shape = stored.t().shape if transpose else stored.shape
    target = torch.empty(shape, dtype=goal)
    read = transfer.Read("w", tmp_path / "w", offset, nbytes, NAMES[source], transpose, digest, target)
    transfer.read_all([read], 2)
    assert torch.equal(target, (stored.t() if transpose else stored).to(goal))


@pytest.mark.parametrize("goal", list(NAMES))
def test_swapped_halves_are_swapped_back(goal: torch.dtype, tmp_path: Path) -> None:
    stored = torch.randn(700, 900, generator=torch.Generator().manual_seed(0))
    offset, nbytes, digest = write(tmp_path / "w", stored)
    target = torch.empty(stored.shape, dtype=goal)
    read = transfer.Read("w", tmp_path / "w", offset, nbytes, "F32", False, digest, target, swap_halves=True)
    [produced] = transfer.read_all([read], 2)
    assert torch.equal(target, torch.cat([stored[350:], stored[:350]]).to(goal))
    assert produced == transfer.checksum_of(target)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 70_000), min_size=1, max_size=6), st.integers(1, 3))
def test_many_tensors_in_a_slab(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], threads: int) -> None:
    folder = tmp_path_factory.mktemp("many")
    slab = SlabPool(CPU).take(sum(aligned(size * 4) for size in sizes))
    assert slab.base.data_ptr() % ALIGNMENT == 0
    reads, at = [], 0
    for number, size in enumerate(sizes):
        stored = torch.arange(size, dtype=torch.float32)
        offset, nbytes, digest = write(folder / str(number), stored, number)
        target = slab.base[at : at + size * 4].view(torch.float32)
        at += aligned(size * 4)
        assert target.data_ptr() % ALIGNMENT == 0
        reads.append(transfer.Read(str(number), folder / str(number), offset, nbytes, "F32", False, digest, target))
    transfer.read_all(reads, threads)
    assert all(
        torch.equal(read.target, torch.arange(size, dtype=torch.float32))
        for read, size in zip(reads, sizes, strict=True)
    )


def test_load_06_a_short_file_is_an_error_never_zeros(tmp_path: Path) -> None:
    stored = torch.randn(1000)
    offset, nbytes, digest = write(tmp_path / "w", stored)
    (tmp_path / "w").write_bytes((tmp_path / "w").read_bytes()[:-4])
    read = transfer.Read("w", tmp_path / "w", offset, nbytes, "F32", False, digest, torch.empty(1000))
    for threads in (1, 2):
        with pytest.raises(IntegrityError, match="ends before"):
            transfer.read_all([read], threads)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a priority of each thread")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_favour_leaves_the_cores_to_everybody_else(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before, seen, fill = priority(), set[int](), transfer._fill

    def look(*arguments: Any) -> None:
        seen.add(priority())
        fill(*arguments)

    monkeypatch.setattr(transfer, "_fill", look)
    stored = torch.randn(1000)
    offset, nbytes, digest = write(tmp_path / "w", stored)
    read = transfer.Read("w", tmp_path / "w", offset, nbytes, "F32", False, digest, torch.empty(1000))
    transfer.read_all([read], threads, background=True)
    assert seen == {19}
    seen.clear()
    transfer.read_all([read], threads)
    assert seen == {before} == {priority()}


def test_one_flipped_bit_is_an_error(tmp_path: Path) -> None:
    stored = torch.randn(1000)
    offset, nbytes, digest = write(tmp_path / "w", stored)
    data = bytearray((tmp_path / "w").read_bytes())
    data[2000] ^= 1
    (tmp_path / "w").write_bytes(data)
    read = transfer.Read("w", tmp_path / "w", offset, nbytes, "F32", False, digest, torch.empty(1000))
    with pytest.raises(IntegrityError, match="differ from the manifest"):
        transfer.read_all([read], 1)


def test_slabs_are_used_again_only_when_nobody_holds_them() -> None:
    pool = SlabPool(CPU)
    slab = pool.take(1 << 20)
    address = slab.base.data_ptr()
    assert pool.give(slab)
    again = pool.take(1 << 20)
    assert again.base.data_ptr() == address
    view = again.base[64:128]
    assert not pool.give(again)
    assert pool.cached_bytes == 0
    del view
    other = pool.take(1 << 20)
    assert pool.used_bytes == 1 << 20
    pool.give(other)
    pool.trim(0)
    assert pool.cached_bytes == pool.used_bytes == 0
