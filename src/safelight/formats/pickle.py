"""Headers of PyTorch's pickled checkpoints (``.ckpt``, ``.pt``, ``.pth``, ``.bin``), read without running any of them.

A pickle is a program. It is scanned first (picklescan); then it is read by an unpickler that knows the few names that
weights need, the same that ``torch.load(weights_only=True)`` allows for tensors, and builds descriptions instead of
tensors. Both containers are read: the zip archive of PyTorch 1.6 and later, and the stream from before.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from picklescan.scanner import SafetyLevel, scan_pickle_bytes

from safelight.errors import CorruptFileError, UnsafeFileError
from safelight.files import open_regular
from safelight.formats.header import ITEM_BYTES, Header, TensorInfo, refuse_known_strangers

MOST_PICKLE_BYTES = 64 << 20
"""The description of a checkpoint, without its tensors' bytes, is a few hundred kilobytes."""

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_STORAGES = {
    "HalfStorage": "F16",
    "FloatStorage": "F32",
    "BFloat16Storage": "BF16",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}


@dataclass(frozen=True, slots=True)
class _StorageType:
    dtype: str


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: str
    elements: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage) or not isinstance(offset, int):
        raise pickle.UnpicklingError("a tensor without a storage")
    sizes, steps = tuple(shape), tuple(strides)
    if len(sizes) != len(steps) or not all(isinstance(n, int) and n >= 0 for n in (offset, *sizes, *steps)):
        raise pickle.UnpicklingError("a tensor whose shape or strides are not sizes")
    return _Tensor(storage, offset, sizes, steps)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _ordered_dict(*content: Any) -> OrderedDict[Any, Any]:
    if any(content):
        raise pickle.UnpicklingError("a dictionary made from something else than its items")
    return OrderedDict()


_ALLOWED: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): tuple,
    **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGES.items()},
}


_OPCODES = frozenset(
    {
        *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK),
        *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2),
        *(pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINSTRING),
        *(pickle.SHORT_BINSTRING, pickle.SHORT_BINBYTES, pickle.BINBYTES),
        *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
        *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
        *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.BUILD, pickle.NEWOBJ, pickle.BINPERSID),
        *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
    }
)
"""What weights are written with. Others (sets, byte arrays of a claimed size, instances) are damage or worse."""


_Written: Any = pickle._Unpickler  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


class _Unpickler(_Written):  # pyright: ignore[reportUntypedBaseClass]
    """Builds descriptions; refuses every name that is not in the table.

    The unpickler that is written in Python: the one in C makes a memo as large as the largest index in the file, so
    that a few damaged bytes take all of the machine's memory.
    """

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _Forbidden(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _StorageType(dtype), str(key), _, int(elements), *_):
                return _Storage(key, dtype, elements)
            case _:
                raise pickle.UnpicklingError("a persistent id that is not a storage")

    dispatch: ClassVar[dict[int, Any]] = {
        code: load for code, load in _Written.dispatch.items() if bytes([code]) in _OPCODES
    }

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_plain_key(key)] = value

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][_plain_key(key)] = value

    dispatch[pickle.SETITEMS[0]] = load_setitems


def _plain_key(key: Any) -> str | int:
    """A key that hashes at once: a nest of tuples in a hundred bytes takes for ever."""
    if type(key) not in (str, int):
        raise pickle.UnpicklingError("a dictionary whose key is neither text nor number")
    return key


class _Forbidden(Exception):
    """A name that weights do not need."""


def read_header(path: Path) -> Header:
    """The header of a pickled checkpoint, of either container.

    Raises UnsafeFileError, naming what it wanted to run, for anything but weights; CorruptFileError for damage.
    """
    descriptor, size = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        start = file.read(64)
        refuse_known_strangers(path, start, size)
        if start.startswith(b"PK\x03\x04"):
            return _read_zip(path, file, size)
        if start.startswith(b"\x80"):
            return _read_legacy(path, file, size)
    raise CorruptFileError(path, "is neither a PyTorch archive nor a pickle")


def _scan(path: Path, data: bytes, multiple: bool) -> None:
    result = scan_pickle_bytes(io.BytesIO(data), str(path), multiple_pickles=multiple)
    bad = [f"{found.module}.{found.name}" for found in result.globals if found.safety == SafetyLevel.Dangerous]
    if bad:
        raise UnsafeFileError(path, sorted(set(bad)))


def _load(path: Path, stream: io.BytesIO) -> Any:
    """One pickle. Every failure of the pickle module, which promises no particular class, becomes a clear error."""
    try:
        return _Unpickler(stream).load()
    except _Forbidden as error:
        raise UnsafeFileError(path, [str(error)]) from error
    except Exception as error:
        raise CorruptFileError(path, f"its pickle cannot be read ({type(error).__name__}: {error})") from error


def _read_zip(path: Path, file: io.BufferedReader, size: int) -> Header:
    try:
        archive = zipfile.ZipFile(file)
        members = {info.filename: info for info in archive.infolist()}
        _refuse_bomb(path, members, size)
        pickled = next((name for name in members if name.endswith("data.pkl")), None)
        if pickled is None:
            raise CorruptFileError(path, "is a zip archive, but not one of PyTorch's (no data.pkl inside)")
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
            raise CorruptFileError(path, "was written on a big-endian machine")
        data = archive.read(pickled)
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        struct.error,
    ) as error:
        raise CorruptFileError(path, f"its zip archive is damaged or cut off ({error})") from error
    _scan(path, data, multiple=False)
    content = _load(path, io.BytesIO(data))
    places: dict[str, tuple[int, int]] = {}
    for name, info in members.items():
        if name.startswith(f"{folder}data/"):
            places[name.removeprefix(f"{folder}data/")] = (_member_offset(path, file, info, size), info.file_size)
    return _header(path, content, places)


def _refuse_bomb(path: Path, members: Mapping[str, zipfile.ZipInfo], size: int) -> None:
    for info in members.values():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > size:
            raise CorruptFileError(
                path, f"{info.filename} would unpack to {info.file_size} bytes: PyTorch stores without compression"
            )
        if info.filename.endswith("data.pkl") and info.file_size > MOST_PICKLE_BYTES:
            raise CorruptFileError(path, f"{info.filename} is {info.file_size} bytes, far more than a checkpoint needs")


def _member_offset(path: Path, file: io.BufferedReader, info: zipfile.ZipInfo, size: int) -> int:
    """Where a stored member's bytes begin: behind its local header, whose fields have their own lengths."""
    file.seek(info.header_offset)
    local = file.read(30)
    if len(local) < 30 or not local.startswith(b"PK\x03\x04"):
        raise CorruptFileError(path, f"zip member {info.filename} is damaged or cut off")
    name_bytes, extra_bytes = struct.unpack("<HH", local[26:30])
    offset = info.header_offset + 30 + name_bytes + extra_bytes
    if offset + info.file_size > size:
        raise CorruptFileError(path, f"zip member {info.filename} was cut off")
    return offset


def _read_legacy(path: Path, file: io.BufferedReader, size: int) -> Header:
    """The stream from before PyTorch 1.6: magic, protocol, system, content, storage keys, then the storages."""
    file.seek(0)
    start = io.BytesIO(file.read(MOST_PICKLE_BYTES))
    _scan(path, start.getvalue(), multiple=True)
    if _load(path, start) != _LEGACY_MAGIC:
        raise CorruptFileError(path, "is a pickle, but not one of PyTorch's")
    _load(path, start)
    _load(path, start)
    content = _load(path, start)
    keys = _load(path, start)
    file.seek(start.tell())
    dtypes = {tensor.storage.key: tensor.storage.dtype for tensor in _tensors(content).values()}
    places: dict[str, tuple[int, int]] = {}
    if not isinstance(keys, list):
        raise CorruptFileError(path, "its list of storages is not a list")
    for key in cast("list[Any]", keys):
        raw = file.read(8)
        if len(raw) < 8 or key not in dtypes:
            raise CorruptFileError(path, "its storages were cut off, or do not belong to its tensors")
        nbytes = struct.unpack("<Q", raw)[0] * ITEM_BYTES[dtypes[key]]
        at = file.tell()
        if at + nbytes > size:
            raise CorruptFileError(path, "its storages were cut off")
        places[key] = (at, nbytes)
        file.seek(at + nbytes)
    return _header(path, content, places)


def _tensors(content: Any) -> dict[str, _Tensor]:
    """The tensors of a pickled object: a flat mapping, or one under ``state_dict``, with other values beside them."""
    mapping = content
    for key in ("state_dict", "params_ema", "params"):
        if isinstance(mapping, Mapping) and isinstance(cast("Mapping[Any, Any]", mapping).get(key), Mapping):
            mapping = cast("Mapping[Any, Any]", mapping)[key]
    found: dict[str, _Tensor] = {}
    if isinstance(mapping, Mapping):
        for name, value in cast("Mapping[Any, Any]", mapping).items():
            if isinstance(value, _Tensor) and isinstance(name, str):
                found[name] = value
            elif isinstance(value, Mapping) and isinstance(name, str):
                inner = cast("Mapping[Any, Any]", value).items()
                tensors = {key: deep for key, deep in inner if isinstance(deep, _Tensor) and isinstance(key, str)}
                found.update({f"{name}.{key}": deep for key, deep in tensors.items()})
    return found


def _header(path: Path, content: Any, places: Mapping[str, tuple[int, int]]) -> Header:
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in _tensors(content).items():
        if tensor.storage.key not in places:
            raise CorruptFileError(path, f"the bytes of tensor {name!r} are missing")
        start, available = places[tensor.storage.key]
        item = ITEM_BYTES[tensor.storage.dtype]
        span, elements, contiguous = 1, 1, True
        for n, step in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
            contiguous = contiguous and (n == 1 or step == elements)
            elements *= n
            span += max(n - 1, 0) * step
        nbytes = (span if elements else 0) * item
        if tensor.offset * item + nbytes > available:
            raise CorruptFileError(path, f"tensor {name!r} reaches beyond its storage")
        strides = None if contiguous else tensor.strides
        offset = start + tensor.offset * item
        tensors[name] = TensorInfo(name, tensor.storage.dtype, tensor.shape, path, offset, nbytes, strides)
    return Header(path, "pickle", tensors)
