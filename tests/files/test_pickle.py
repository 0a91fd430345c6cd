"""Pickles are read as weights, or refused with what they wanted to run."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from support.scale import times

from safelight.catalog.convert import to_safetensors
from safelight.errors import CorruptFileError, FileError, UnsafeFileError
from safelight.files.pickle import read_header


def content() -> dict[str, torch.Tensor]:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return {
        "plain": base.clone(),
        "transposed": base.t(),
        "part": base[1:3, 2:4],
        "half": base.half(),
        "brain": base.bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
    }


@pytest.mark.parametrize("legacy", [False, True])
def test_reads_what_torch_reads(tmp_path: Path, legacy: bool) -> None:
    path, target = tmp_path / "weights.ckpt", tmp_path / "weights.safetensors"
    torch.save({"state_dict": content(), "epoch": 3}, path, _use_new_zipfile_serialization=not legacy)
    with target.open("wb") as file:
        to_safetensors(read_header(path).tensors.values(), file)
    from safetensors.torch import load_file

    converted = load_file(target)
    loaded = torch.load(path, weights_only=True)["state_dict"]
    assert converted.keys() == loaded.keys()
    for name, tensor in loaded.items():
        assert converted[name].dtype == tensor.dtype
        assert torch.equal(converted[name], tensor), name


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/safelight-was-run",)


class Odd:
    def __reduce__(self) -> tuple[object, tuple[int]]:
        return random.Random, (3,)


@pytest.mark.parametrize(("thing", "wanted"), [(Evil(), "system"), (Odd(), "random.Random")])
@pytest.mark.parametrize("legacy", [False, True])
def test_what_wants_to_run_is_refused_by_name(tmp_path: Path, thing: object, wanted: str, legacy: bool) -> None:
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {"a": torch.ones(2)}, "x": thing}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UnsafeFileError, match=wanted):
        read_header(path)
    assert not Path("/tmp/safelight-was-run").exists()


def test_a_bare_pickle_that_runs_something(tmp_path: Path) -> None:
    path = tmp_path / "evil.bin"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UnsafeFileError, match="system"):
        read_header(path)


def test_zip_bombs_and_strange_archives(tmp_path: Path) -> None:
    bomb, other = tmp_path / "bomb.ckpt", tmp_path / "other.ckpt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 50_000_000)
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CorruptFileError, match="is compressed or claims"):
        read_header(bomb)
    with pytest.raises(CorruptFileError, match=r"no data\.pkl"):
        read_header(other)


@pytest.mark.parametrize("legacy", [False, True])
def test_mutations_and_truncations_give_only_clean_errors(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "mutated.ckpt"
    torch.save({"state_dict": content()}, path, _use_new_zipfile_serialization=not legacy)
    good = path.read_bytes()
    chance = random.Random(7)
    for _ in range(times(400, 1500)):
        data = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data[: chance.randrange(len(data))] if chance.random() < 0.3 else data)
        try:
            header = read_header(path)
        except FileError:
            continue
        size = path.stat().st_size
        assert all(info.offset + info.nbytes <= size for info in header.tensors.values())


def test_a_huge_memo_index_takes_no_memory(tmp_path: Path) -> None:
    """Five bytes that make pickle's C implementation reserve and clear tens of gigabytes."""
    path = tmp_path / "memo.bin"
    path.write_bytes(b"\x80\x02K\x01r" + (2**31 - 1).to_bytes(4, "little") + b".")
    with pytest.raises(CorruptFileError, match="PyTorch did not write it"):
        read_header(path)


NEST = b")" + b"2\x86" * 60


@pytest.mark.parametrize("data", [NEST + b"Q.", b"}" + NEST + b"K\x01s.", b"\x96" + b"\xff" * 7 + b"\x0fx."])
def test_small_bombs_are_refused_at_once(data: bytes, tmp_path: Path) -> None:
    """Nests of tuples that take for ever to print or hash, and a byte array of a claimed size."""
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x05" + data)
    with pytest.raises(CorruptFileError, match="cannot be read"):
        read_header(path)


def test_numpy_scalars_are_not_weights(tmp_path: Path) -> None:
    path = tmp_path / "numpy.ckpt"
    torch.save({"a": np.float32(3)}, path)
    assert read_header(path).tensors == {}


def test_names_cannot_be_made_longer_than_the_file(tmp_path: Path) -> None:
    """One dictionary under many names, and long names of many tensors: nothing is joined before it is known sound."""
    group = {str(number): torch.zeros(1) for number in range(3)}
    torch.save({"a": group, "b": group}, tmp_path / "twice.pt")
    with pytest.raises(CorruptFileError, match="one group of tensors under several names, among them 'b'"):
        read_header(tmp_path / "twice.pt")
    torch.save({"x" * 5000: {"y": torch.zeros(1)}}, tmp_path / "long.pt")
    with pytest.raises(CorruptFileError, match="is not the name of a tensor"):
        read_header(tmp_path / "long.pt")
    torch.save({"a": {"b": torch.zeros(1)}, "c": torch.zeros(1), "x" * 5000: 1}, tmp_path / "right.pt")
    assert set(read_header(tmp_path / "right.pt").tensors) == {"a.b", "c"}
