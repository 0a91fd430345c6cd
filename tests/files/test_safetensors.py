"""Bad files each get their own message; no bytes whatever bring anything else than a clean error."""

from __future__ import annotations

import contextlib
import json
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from support.scale import times

from safelight.errors import CorruptFileError, FileError, UnreadableFileError
from safelight.files.safetensors import MOST_TENSORS, read_header

GOOD = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}, {"format": "pt"})


def file_with(header: object, data: bytes = b"", raw: bool = False) -> bytes:
    text = header if raw else json.dumps(header).encode()
    assert isinstance(text, bytes)
    return struct.pack("<Q", len(text)) + text + data


def one(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"t": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


FOUR = b"\0" * 4
BAD = {
    "is empty": b"",
    "is a web page": b"<!DOCTYPE html><html><body>Sign in</body></html>",
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n",
    "too short": b"\x01bcdefg",
    "it is text": b"no model at all, just a note",
    "cut off, or is not a safetensors file": struct.pack("<Q", 1 << 40) + b"{}",
    "header is not JSON": file_with(b"{nonsense", raw=True),
    "nested too deep": file_with(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", raw=True),
    "a JSON list, not an object": file_with([1, 2]),
    "lists t twice": file_with(
        b'{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        FOUR,
        raw=True,
    ),
    "unknown dtype 'F33'": file_with(one("F33"), FOUR),
    "not a list of sizes": file_with(one(shape=[-1]), FOUR),
    "not a pair of offsets": file_with(one(offsets=[0]), FOUR),
    "ends at byte 4 of 3": file_with(one(), b"\0" * 3),
    "needs 8 bytes, data_offsets give 4": file_with(one(shape=[2]), FOUR),
    "overlap": file_with({**one(), "u": one()["t"]}, FOUR),
    "trailing bytes": file_with(one(), b"\0" * 9),
    "belong to no tensor": file_with(one(offsets=[4, 8]), b"\0" * 8),
    "whose values are strings": file_with({"__metadata__": {"a": 1}}),
    "is not an object": file_with({"t": 3}),
    "has 65 axes": file_with(one(shape=[1] * 65), FOUR),
}


@pytest.mark.parametrize("message", BAD)
def test_each_bad_file_has_its_message(message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BAD[message])
    with pytest.raises(CorruptFileError, match=message.replace("(", r"\(")) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_a_good_file_reads_as_the_library_wrote_it(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(GOOD)
    header = read_header(path)
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("F16", (4,)),
    }
    info = header.tensors["a"]
    assert np.frombuffer(GOOD[info.offset : info.offset + info.nbytes], np.float32).tolist() == [0, 1, 2, 3, 4, 5]
    assert header.metadata == {"format": "pt"}


def test_what_is_not_a_file(tmp_path: Path) -> None:
    link, pipe, loop = tmp_path / "link", tmp_path / "pipe", tmp_path / "loop"
    link.symlink_to(tmp_path / "nowhere")
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    for path, message in (
        (link, "to a file that does not exist"),
        (pipe, "is a pipe"),
        (tmp_path, "is a directory"),
        (Path("/dev/null"), "is a device"),
        (tmp_path / "none", "does not exist"),
        (loop, "symbolic link"),
    ):
        with pytest.raises(UnreadableFileError, match=message):
            read_header(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_one_may_not_read(tmp_path: Path) -> None:
    path = tmp_path / "secret.safetensors"
    path.write_bytes(GOOD)
    path.chmod(0)
    with pytest.raises(UnreadableFileError, match="this user has no permission"):
        read_header(path)


def test_truncation_at_every_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    for length in range(len(GOOD)):
        path.write_bytes(GOOD[:length])
        with pytest.raises(CorruptFileError):
            read_header(path)


def mutated(chance: random.Random, data: bytes) -> bytes:
    """Bytes changed, cut out, doubled, or cut off; mostly within the header."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(out)) if out else 0
        kind = chance.random()
        if kind < 0.5 and out:
            out[at] = chance.choice([chance.randrange(256), *b'0123456789[]{}",:-eE'])
        elif kind < 0.7:
            del out[at : at + chance.randint(1, 8)]
        elif kind < 0.85:
            out[at:at] = out[at : at + chance.randint(1, 8)]
        else:
            del out[at:]
    return bytes(out)


def test_mutations_give_only_clean_errors(tmp_path: Path) -> None:
    chance = random.Random(20)
    path = tmp_path / "mutated.safetensors"
    refused = 0
    count = times(2_000, 20_000)
    for _ in range(count):
        path.write_bytes(mutated(chance, GOOD))
        try:
            header = read_header(path)
        except FileError:
            refused += 1
            continue
        size = path.stat().st_size
        assert all(info.offset + info.nbytes <= size for info in header.tensors.values())
    assert refused > 0.75 * count


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.sampled_from(["t", "__metadata__", "dtype", "shape", "data_offsets"]), inner)
        ),
        max_leaves=12,
    ),
    st.binary(max_size=16),
)
def test_any_json_gives_only_clean_errors(tmp_path_factory: pytest.TempPathFactory, value: object, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(file_with(value, data))
    with contextlib.suppress(CorruptFileError):
        read_header(path)


def test_a_header_of_very_many_names_is_refused_early(tmp_path: Path) -> None:
    entry = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"n{i}": entry for i in range(MOST_TENSORS + 1)}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CorruptFileError, match="the limit is"):
        read_header(tmp_path / "x.safetensors")
