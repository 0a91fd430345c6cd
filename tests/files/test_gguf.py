"""Safelight reads the same GGUF headers as the package gguf. Each fault has its own message."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from support import gguf_files
from support.gguf_files import Stored, random_blocks
from support.scale import times

from safelight.errors import CorruptFileError, FileError, UnsupportedModelError
from safelight.files.blocks import BLOCKS
from safelight.files.gguf import ALIGNMENT, MAGIC, ORIGINAL_SHAPE, TYPES, read_header

F32, Q4_0 = 0, 2


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(name: str = "t", dims: tuple[int, ...] = (32, 2), kind: int = Q4_0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}qIQ", len(dims), *dims, kind, offset)


def value(key: str, number: int, data: bytes) -> bytes:
    return text(key) + struct.pack("<I", number) + data


def file_with(
    *entries: bytes, values: tuple[bytes, ...] = (), data: int = 64, version: int = 3, magic: bytes = MAGIC
) -> bytes:
    header = magic + struct.pack("<IQQ", version, len(entries), len(values)) + b"".join(values) + b"".join(entries)
    return header + b"\0" * (-len(header) % ALIGNMENT) + b"\0" * data


ONE_GIB = 1 << 30
BAD = {
    "is empty": b"",
    "is a web page": b"<!DOCTYPE html><html></html>",
    "is not a GGUF file": b"GGML" + b"\0" * 60,
    "GGUF of version 1;": file_with(version=1),
    "big-endian": MAGIC + struct.pack(">IQQ", 3, 0, 0),
    "1152921504606846976 tensors": MAGIC + struct.pack("<IQQ", 3, 1 << 60, 0),
    "within the length of a tensor's name": MAGIC + struct.pack("<IQQ", 3, 1, 0),
    "within a tensor's name": MAGIC + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", ONE_GIB),
    "is not UTF-8": file_with(struct.pack("<Q", 1) + b"\xff" + struct.pack("<IIQ", 0, 0, 0)),
    "lists tensor 't' twice": file_with(entry(), entry(offset=64)),
    "has 5 axes; the limit is 4": file_with(entry(dims=(32, 1, 1, 1, 1))),
    "has the size -2": file_with(entry(dims=(32, -2))),
    "the unknown type 99": file_with(entry(kind=99)),
    "is IQ2_XXS; Q4_0": file_with(entry(kind=16, dims=(256,))),
    "rows of 33 numbers, no multiple of the 32": file_with(entry(dims=(33, 2))),
    "begins at 8, no multiple of 32": file_with(entry(offset=8)),
    "ends at byte": file_with(entry(offset=1 << 20)),
    "was cut off": file_with(entry(dims=(32, 1000))),
    "overlap": file_with(entry(), entry("u", offset=32), data=128),
    "general.alignment is '12'": file_with(entry(), values=(value("general.alignment", 4, struct.pack("<I", 12)),)),
    "metadata 'a' twice": file_with(values=(value("a", 0, b"1"), value("a", 0, b"1"))),
    "has the unknown type 13": file_with(values=(value("a", 13, b""),)),
    "claims 1073741824 elements": file_with(values=(value("a", 9, struct.pack("<IQ", 6, ONE_GIB)),)),
    "and no such tensor": file_with(entry(), values=(value(f"{ORIGINAL_SHAPE}u", 8, text("1")),)),
    "general.alignment is '1111": file_with(entry(), values=(value("general.alignment", 8, text("1" * 5000)),)),
    "is '999999": file_with(entry(), values=(value(f"{ORIGINAL_SHAPE}t", 8, text("9" * 5000)),)),
    "does not fit the tensor's shape": file_with(entry(), values=(value(f"{ORIGINAL_SHAPE}t", 8, text("5,5")),)),
}


@pytest.mark.parametrize("says", BAD)
def test_each_fault_has_its_own_message(says: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(BAD[says])
    with pytest.raises((CorruptFileError, UnsupportedModelError)) as caught:
        read_header(path)
    assert says in str(caught.value)


def good(path: Path) -> dict[str, Stored]:
    """Write a file with each form, and return its tensors."""
    generator = np.random.default_rng(1)
    tensors: dict[str, Stored] = {
        form: (form, random_blocks(form, 6, generator), (3, 2 * block.elements)) for form, block in BLOCKS.items()
    }
    tensors["half"] = ("F16", generator.normal(0, 1, (2, 3)).astype(np.float16), (2, 3))
    tensors["full"] = ("F32", generator.normal(0, 1, 5).astype(np.float32), (5,))
    tensors["wide"] = ("Q4_K", random_blocks("Q4_K", 9, generator), (16, 16, 3, 3))
    gguf_files.write(path, tensors, note="a note")
    return tensors


def test_a_header_is_that_of_gguf(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    tensors = good(path)
    header = read_header(path)
    assert header.format == "gguf"
    assert header.metadata["note"] == "a note"
    theirs = {one.name: one for one in GGUFReader(path).tensors}
    assert list(header.tensors) == list(theirs) == list(tensors)
    data = path.read_bytes()
    for name, info in header.tensors.items():
        form, raw, shape = tensors[name]
        assert (info.dtype, info.shape) == (form, shape)
        assert info.dtype == theirs[name].tensor_type.name
        assert (info.offset, info.nbytes) == (theirs[name].data_offset, theirs[name].n_bytes)
        assert data[info.offset : info.offset + info.nbytes] == raw.tobytes()


def test_the_names_of_types_are_those_of_gguf() -> None:
    assert {number: gguf_files.kind_of(name).value for number, name in TYPES.items()} == {n: n for n in TYPES}


def test_an_array_of_many_numbers_is_not_kept(tmp_path: Path) -> None:
    """As text, it would take eighty times its memory."""
    many, few = struct.pack("<IQ", 0, 5000) + b"\x07" * 5000, struct.pack("<IQ", 0, 3) + b"\x07" * 3
    path = tmp_path / "a.gguf"
    path.write_bytes(file_with(entry(), values=(value("many", 9, many), value("few", 9, few)), data=64))
    metadata = read_header(path).metadata
    assert (metadata["many"], metadata["few"]) == ("", "7,7,7")


def test_mutations_give_only_clean_errors(tmp_path: Path) -> None:
    chance = random.Random(5)
    path = tmp_path / "mutated.gguf"
    good(path)
    data, refused = path.read_bytes(), 0
    end = read_header(path).tensors["Q4_0"].offset
    for _ in range(times(500, 20_000)):
        changed = bytearray(data)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(end)
            changed[at : at + chance.choice((0, 1, 1, 8))] = chance.randbytes(chance.choice((1, 1, 8)))
        if chance.random() < 0.2:
            del changed[chance.randrange(len(changed)) :]
        path.write_bytes(changed)
        try:
            read_header(path)
        except FileError:
            refused += 1
    assert refused > times(100, 4000)
