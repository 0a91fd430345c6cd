"""Headers of PyTorch's pickled checkpoints (``.ckpt``, ``.pt``, ``.pth``, ``.bin``), read without running any of them.

A pickle is a program. It is read by a machine that only describes what the program would make
(:mod:`safelight.formats.inert`), and refused with everything that it would import beyond what weights are written with;
picklescan then says what it thinks of it. Both containers are read: the zip archive of PyTorch 1.6 and later, and the
stream from before.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from picklescan.scanner import SafetyLevel, scan_pickle_bytes

from safelight.errors import CorruptFileError, FileError, UnsafeFileError
from safelight.files import open_regular
from safelight.formats.header import ITEM_BYTES, Header, TensorInfo, refuse_known_strangers
from safelight.formats.inert import Machine, Tensor, Thing, Unreadable

MOST_PICKLE_BYTES = 64 << 20
"""The description of a checkpoint, without its tensors' bytes, is a few hundred kilobytes."""

MOST_NAME = 1000
"""Letters of a tensor's name; the longest known have 150."""

MOST_REPEATED = 8
"""How many times larger than its file the tensors may be that are views of the same numbers; …"""

FREELY_REPEATED = 64 << 20
"""… beside these bytes, which small files may always repeat."""

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read_header(path: Path) -> Header:
    """The header of a pickled checkpoint, of either container.

    Raises UnsafeFileError, naming what it wanted to run, for anything but weights; CorruptFileError for damage.
    """
    descriptor, size = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        start = file.read(64)
        refuse_known_strangers(path, start, size)
        try:
            if start.startswith(b"PK\x03\x04"):
                return _read_zip(path, file, size)
            if start.startswith(b"\x80"):
                return _read_legacy(path, file, size)
        except FileError:
            raise
        except Exception as error:
            # zipfile and picklescan promise no particular classes of error for a damaged file.
            raise CorruptFileError(path, f"is damaged or cut off ({type(error).__name__}: {error!s:.200})") from error
    raise CorruptFileError(path, "is neither a PyTorch archive nor a pickle")


def _scan(path: Path, data: bytes) -> None:
    result = scan_pickle_bytes(io.BytesIO(data), str(path), multiple_pickles=False)
    bad = [f"{found.module}.{found.name}" for found in result.globals if found.safety == SafetyLevel.Dangerous]
    if bad:
        raise UnsafeFileError(path, sorted(set(bad)))


def _load(path: Path, machine: Machine) -> Any:
    """The machine's next pickle, if it wants nothing but weights."""
    start = machine.at
    try:
        content = machine.load()
    except Unreadable as error:
        if not machine.wanted:
            raise CorruptFileError(path, f"its pickle cannot be read: {error}") from error
        content = None
    if machine.wanted:
        raise UnsafeFileError(path, sorted(machine.wanted)[:20])
    _scan(path, machine.data[start : machine.at])
    return content


def _read_zip(path: Path, file: io.BufferedReader, size: int) -> Header:
    try:
        archive = zipfile.ZipFile(file)
        members = {info.filename: info for info in archive.infolist()}
        _refuse_bomb(path, members, size)
        pickled = next((name for name in members if name.endswith("data.pkl")), None)
        if pickled is None:
            raise CorruptFileError(path, "is a zip archive, but not one of PyTorch's (no data.pkl inside)")
        folder = pickled.removesuffix("data.pkl")
        order = members.get(f"{folder}byteorder")
        if order is not None and (order.file_size > 16 or archive.read(order) != b"little"):
            raise CorruptFileError(path, "was written on a big-endian machine")
        data = archive.read(pickled)
    except FileError:
        raise
    except Exception as error:
        raise CorruptFileError(path, f"its zip archive is damaged or cut off ({error!s:.200})") from error
    content = _load(path, Machine(data))
    places: dict[str, tuple[int, int]] = {}
    for name, info in members.items():
        if name.startswith(f"{folder}data/"):
            places[name.removeprefix(f"{folder}data/")] = (_member_offset(path, file, info, size), info.file_size)
    return _header(path, content, places, size)


def _refuse_bomb(path: Path, members: Mapping[str, zipfile.ZipInfo], size: int) -> None:
    for info in members.values():
        name = f"{info.filename!r:.200}"
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > size:
            raise CorruptFileError(
                path, f"{name} would unpack to {info.file_size} bytes: PyTorch stores without compression"
            )
        if info.filename.endswith("data.pkl") and info.file_size > MOST_PICKLE_BYTES:
            raise CorruptFileError(path, f"{name} is {info.file_size} bytes, far more than a checkpoint needs")


def _member_offset(path: Path, file: io.BufferedReader, info: zipfile.ZipInfo, size: int) -> int:
    """Where a stored member's bytes begin: behind its local header, whose fields have their own lengths."""
    name = f"{info.filename!r:.200}"
    if not 0 <= info.header_offset < size:
        raise CorruptFileError(path, f"zip member {name} is said to be outside of it")
    file.seek(info.header_offset)
    local = file.read(30)
    if len(local) < 30 or not local.startswith(b"PK\x03\x04"):
        raise CorruptFileError(path, f"zip member {name} is damaged or cut off")
    name_bytes, extra_bytes = struct.unpack("<HH", local[26:30])
    offset = info.header_offset + 30 + name_bytes + extra_bytes
    if offset + info.file_size > size:
        raise CorruptFileError(path, f"zip member {name} was cut off")
    return offset


def _read_legacy(path: Path, file: io.BufferedReader, size: int) -> Header:
    """The stream from before PyTorch 1.6: magic, protocol, system, content, storage keys, then the storages."""
    file.seek(0)
    machine = Machine(file.read(MOST_PICKLE_BYTES))
    magic = _load(path, machine)
    if type(magic) is not int or magic != _LEGACY_MAGIC:
        raise CorruptFileError(path, "is a pickle, but not one of PyTorch's")
    _load(path, machine)
    _load(path, machine)
    content = _load(path, machine)
    keys = _load(path, machine)
    file.seek(machine.at)
    places: dict[str, tuple[int, int]] = {}
    if type(keys) is not list:
        raise CorruptFileError(path, "its list of storages is not a list")
    for key in cast("list[Any]", keys):
        raw = file.read(8)
        storage = machine.storages.get(key) if type(key) is str else None
        if len(raw) < 8 or storage is None or key in places:
            raise CorruptFileError(path, "its storages were cut off, or do not belong to its tensors")
        nbytes = struct.unpack("<Q", raw)[0] * ITEM_BYTES[storage.dtype]
        at = file.tell()
        if at + nbytes > size:
            raise CorruptFileError(path, "its storages were cut off")
        places[key] = (at, nbytes)
        file.seek(at + nbytes)
    return _header(path, content, places, size)


def _mapping(value: Any) -> dict[Any, Any] | None:
    """A dictionary, or the parameters of what PyTorch keeps some in (the first embeddings were)."""
    if type(value) is Thing and value.name.name == "ParameterDict" and type(value.state) is dict:
        value = cast("dict[Any, Any]", value.state).get("_parameters")
    return cast("dict[Any, Any]", value) if type(value) is dict else None


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    """The tensors of a pickled object: a flat mapping, or one under ``state_dict``, with other values beside them.

    Raises CorruptFileError for a name that is too long, and for a group of tensors that stands under several names: the
    names of a short file could then be as long as memory, and as many as the square of its length.
    """
    mapping = _mapping(content) or {}
    for key in ("state_dict", "params_ema", "params"):
        inner = _mapping(mapping.get(key))
        mapping = mapping if inner is None else inner
    found: dict[str, Tensor] = {}
    groups: set[int] = set()
    for name, value in mapping.items():
        if type(name) is not str:
            continue
        if type(value) is Tensor:
            found[_sound_name(path, name)] = value
        group = _mapping(value) or {}
        tensors = {key: deep for key, deep in group.items() if type(deep) is Tensor and type(key) is str}
        if tensors and id(group) in groups:
            raise CorruptFileError(path, f"holds the same group of tensors under several names, {name!r:.100} too")
        groups.add(id(group))
        for key, tensor in tensors.items():
            found[_sound_name(path, name, key)] = tensor
    return found


def _sound_name(path: Path, *parts: str) -> str:
    # The lengths first: what is too long is never joined.
    name = ".".join(parts) if sum(map(len, parts)) < MOST_NAME else ""
    if not name or not name.isprintable() or name == "__metadata__":
        raise CorruptFileError(path, f"{parts[0][:100]!r} is not the name of a tensor")
    return name


def _header(path: Path, content: Any, places: Mapping[str, tuple[int, int]], size: int) -> Header:
    tensors: dict[str, TensorInfo] = {}
    written = 0
    for name, tensor in _tensors(path, content).items():
        if tensor.storage.key not in places:
            raise CorruptFileError(path, f"the bytes of tensor {name!r} are missing")
        info = _info(path, name, tensor, *places[tensor.storage.key])
        tensors[name] = info
        written += max(info.nbytes, info.elements * ITEM_BYTES[info.dtype])
        if written > MOST_REPEATED * size + FREELY_REPEATED:
            raise CorruptFileError(path, f"its tensors repeat the same numbers, {name!r} too, far beyond its size")
    return Header(path, "pickle", tensors)


def _info(path: Path, name: str, tensor: Tensor, start: int, available: int) -> TensorInfo:
    """Where a tensor is whose storage begins at ``start``; its bytes reach from its first number to its last."""
    item = ITEM_BYTES[tensor.storage.dtype]
    last, elements, contiguous = 0, 1, True
    for n, step in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        contiguous = contiguous and (n == 1 or step == elements)
        elements *= n
        last += max(n - 1, 0) * step
    nbytes = (last + 1 if elements else 0) * item
    if tensor.offset * item + nbytes > available:
        raise CorruptFileError(path, f"tensor {name!r} reaches beyond its storage")
    strides = None if contiguous or not elements else tensor.strides
    return TensorInfo(name, tensor.storage.dtype, tensor.shape, path, start + tensor.offset * item, nbytes, strides)
