"""Reads the headers of PyTorch's pickled checkpoints (``.ckpt``, ``.pt``, ``.pth``, ``.bin``) without running them.

A pickle is a program. :mod:`safelight.files.inert` only describes the objects that the program would create. A pickle
that imports names which weights do not need is rejected, and the error lists these names.
Both containers are supported: the zip archive of PyTorch 1.6 and later, and the older stream.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safelight.errors import CorruptFileError, FileError, UnsafeFileError
from safelight.files.disk import open_regular
from safelight.files.header import ITEM_BYTES, Header, TensorInfo, refuse_known_strangers
from safelight.files.inert import Machine, Tensor, Thing, Unreadable

MOST_PICKLE_BYTES = 64 << 20
"""Bytes of a pickle. The pickle of a checkpoint, without its tensors' bytes, has a few hundred kilobytes."""

MOST_NAME = 1000
"""Characters of a tensor's name. The longest known names have 150."""

MOST_REPEATED = 8
"""Tensors may be views of the same numbers. Together they may be this many times larger than their file, …"""

FREELY_REPEATED = 64 << 20
"""… plus this many bytes, so that small files may repeat numbers more often."""

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read_header(path: Path) -> Header:
    """Read the header of a pickled checkpoint, of either container.

    Raises UnsafeFileError when the pickle imports anything that weights do not need. The error lists these names.
    Raises CorruptFileError when the file is damaged.
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
            # zipfile does not document which exceptions it raises for a damaged file.
            raise CorruptFileError(path, f"is damaged or cut off ({type(error).__name__}: {error!s:.200})") from error
    raise CorruptFileError(path, "is neither a PyTorch archive nor a pickle")


def _load(path: Path, machine: Machine) -> Any:
    """Read the machine's next pickle. Raises UnsafeFileError if it imports anything that weights do not need."""
    try:
        content = machine.load()
    except Unreadable as error:
        if not machine.wanted:
            raise CorruptFileError(path, f"its pickle cannot be read: {error}") from error
        content = None
    if machine.wanted:
        raise UnsafeFileError(path, sorted(machine.wanted)[:20])
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
                path, f"{name} is compressed or claims {info.file_size} bytes; PyTorch stores without compression"
            )
        if info.filename.endswith("data.pkl") and info.file_size > MOST_PICKLE_BYTES:
            raise CorruptFileError(path, f"{name} is {info.file_size} bytes, far more than a checkpoint needs")


def _member_offset(path: Path, file: io.BufferedReader, info: zipfile.ZipInfo, size: int) -> int:
    """Return the offset of a stored member's bytes. They follow its local header, which has fields of any length."""
    name = f"{info.filename!r:.200}"
    if not 0 <= info.header_offset < size:
        raise CorruptFileError(path, f"zip member {name} claims an offset outside the archive")
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
    """Read the stream from before PyTorch 1.6: magic, protocol, system, content, storage keys, then the storages."""
    file.seek(0)
    machine = Machine(file.read(MOST_PICKLE_BYTES))
    magic = _load(path, machine)
    if type(magic) is not int or magic != _LEGACY_MAGIC:
        raise CorruptFileError(path, "is a pickle, but PyTorch did not write it")
    _load(path, machine)
    _load(path, machine)
    content = _load(path, machine)
    keys = _load(path, machine)
    file.seek(machine.bytes.at)
    places: dict[str, tuple[int, int]] = {}
    if type(keys) is not list:
        raise CorruptFileError(path, "its list of storages is not a list")
    for key in cast("list[Any]", keys):
        raw = file.read(8)
        storage = machine.storages.get(key) if type(key) is str else None
        if len(raw) < 8 or storage is None or key in places:
            raise CorruptFileError(path, "its storages were cut off, or do not match its tensors")
        nbytes = struct.unpack("<Q", raw)[0] * ITEM_BYTES[storage.dtype]
        at = file.tell()
        if at + nbytes > size:
            raise CorruptFileError(path, "its storages were cut off")
        places[key] = (at, nbytes)
        file.seek(at + nbytes)
    return _header(path, content, places, size)


def _mapping(value: Any) -> dict[Any, Any] | None:
    """Return a dictionary as it is, and the parameters of a ``ParameterDict`` (as in the first embeddings)."""
    if type(value) is Thing and value.name.name == "ParameterDict" and type(value.state) is dict:
        value = cast("dict[Any, Any]", value.state).get("_parameters")
    return cast("dict[Any, Any]", value) if type(value) is dict else None


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    """Return the tensors of a pickled object, by name.

    The object is a flat mapping, or has one under ``state_dict``. Values that are not tensors are ignored.
    Raises CorruptFileError for a name that is too long, because a short file could then fill the memory with names.
    Raises CorruptFileError for a group of tensors under several names, because the number of names could then grow with
    the square of the file's length.
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
            raise CorruptFileError(path, f"holds one group of tensors under several names, among them {name!r:.100}")
        groups.add(id(group))
        for key, tensor in tensors.items():
            found[_sound_name(path, name, key)] = tensor
    return found


def _sound_name(path: Path, *parts: str) -> str:
    # The lengths are checked first, so that parts that are too long are never joined.
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
            problem = "use the same stored numbers again and again, and would need far more memory than the file's size"
            raise CorruptFileError(path, f"its tensors, such as {name!r}, {problem}")
    return Header(path, "pickle", tensors)


def _info(path: Path, name: str, tensor: Tensor, start: int, available: int) -> TensorInfo:
    """Describe a tensor whose storage begins at byte ``start``. Its bytes reach from its first element to its last."""
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
