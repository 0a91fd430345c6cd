"""Reads pickles as data. It imports nothing, calls nothing and changes nothing that a pickle names.

A pickle is a program for a stack machine. The machine in this module has its own values for everything that such a
program can create: numbers, strings, lists, tuples, dictionaries, names, and objects created by calling a name.

The machine never looks a name up, so no instruction can reach a function or a class. When a pickle "calls" one of the
few names that weights need, the machine creates a description. When it calls any other name, the machine creates an
object that only stores that name. The machine collects all names that weights do not need, so that the error for a
rejected file can list everything that it wanted to run.

The length of a pickle bounds its time and memory. The machine counts instructions and copied items. No instruction
reserves more memory than the bytes behind it fill. Nothing here descends into nested values: the machine does not hash,
compare or print them.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

MOST_INSTRUCTIONS = 1_000_000
"""Limit of instructions. A checkpoint has about thirty per tensor, and the largest have a few thousand tensors."""

MOST_NAME = 256
"""Characters of a module's name, or of a name in a module."""

MOST_AXES = 64
"""Axes of a tensor: the limit of PyTorch and numpy. No model has more than five."""

_LARGEST = 2**62
"""Sizes, strides and offsets must be smaller than this."""

_LARGEST_KEY = 2**31
"""Integer keys must be smaller than this. Larger ones could be chosen to collide, and make a dictionary very slow."""

DTYPES: Mapping[str, str] = {
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
"""Name of a storage class in ``torch``, and its dtype in the safetensors format."""

_KNOWN: Mapping[str, frozenset[str]] = {
    "__builtin__": frozenset({"set"}),
    "builtins": frozenset({"set"}),
    "_codecs": frozenset({"encode"}),
    "numpy": frozenset({"dtype", "ndarray"}),
    "numpy.core.multiarray": frozenset({"scalar", "_reconstruct"}),
    "numpy._core.multiarray": frozenset({"scalar", "_reconstruct"}),
    "torch": frozenset(
        {"Size", "device", "float16", "float32", "float64", "bfloat16", "int8", "int16", "int32", "int64", "uint8"}
        | {"bool", *DTYPES}
    ),
    "torch.nn.modules.container": frozenset({"ParameterDict"}),
    "torch._utils": frozenset(
        {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state"}
    ),
    "collections": frozenset({"OrderedDict"}),
    "pytorch_lightning.utilities.parsing": frozenset({"AttributeDict"}),
    "lightning_fabric.utilities.data": frozenset({"AttributeDict"}),
}
"""Names that occur in checkpoints, by module: those of weights, and of the numbers that training stores with them."""

_CALLBACKS = ("pytorch_lightning.callbacks", "lightning.pytorch.callbacks")
"""Lightning stores the settings of its callbacks under the callbacks' classes."""


class Unreadable(Exception):
    """The pickle is damaged or malicious: PyTorch does not write weights like this."""


@dataclass(frozen=True, slots=True)
class Name:
    """A name that a pickle would import."""

    module: str
    name: str

    @property
    def known(self) -> bool:
        """Whether this name occurs in checkpoints."""
        parents = self.module.split(".")[:3]
        callback = ".".join(parents[:2]) in _CALLBACKS or ".".join(parents) in _CALLBACKS
        return callback or self.name in _KNOWN.get(self.module, ())


@dataclass(eq=False, slots=True)
class Thing:
    """The object that a pickle would create by calling ``name``, which weights do not need. ``state``: its state."""

    name: Name
    state: Any = None


@dataclass(frozen=True, eq=False, slots=True)
class Storage:
    """A contiguous sequence of numbers. ``key``: its name in the file."""

    key: str
    dtype: str
    elements: int


@dataclass(frozen=True, eq=False, slots=True)
class Tensor:
    """A view of a storage; ``offset`` and ``strides`` count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Bytes:
    """Reads numbers and strings from ``data``. ``at``: bytes read so far."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        end = self.at + count
        if count < 0 or end > len(self.data):
            raise Unreadable("it ends too early")
        found = self.data[self.at : end]
        self.at = end
        return found

    def number(self, form: str) -> Any:
        """Read one number. ``form``: its format in :mod:`struct`."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def long(self) -> int:
        """Read an integer of any length that follows its length in bytes."""
        return int.from_bytes(self.raw("<B"), "little", signed=True)

    def text(self, form: str) -> str:
        """Read a string that follows its length. ``form``: the length's format in :mod:`struct`."""
        return _decoded(self.raw(form))

    def old_text(self, form: str) -> str | bytes:
        """Read a Python 2 string that follows its length. Return bytes if it is not valid UTF-8."""
        raw = self.raw(form)
        try:
            return _decoded(raw)
        except Unreadable:
            return raw

    def raw(self, form: str) -> bytes:
        """Read bytes that follow their length. ``form``: the length's format in :mod:`struct`."""
        return self.take(self.number(form))

    def line(self) -> str:
        """Read a string up to the end of its line. Pickles store names in this form."""
        end = self.data.find(b"\n", self.at, self.at + MOST_NAME + 1)
        if end < 0:
            raise Unreadable("a name without an end")
        found = self.take(end - self.at)
        self.at += 1
        return _decoded(found)


class _Stack:
    """The values of the machine. No value below the last mark can be taken."""

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._marks: list[int] = []

    def push(self, value: Any) -> None:
        self._values.append(value)

    def top(self) -> Any:
        if len(self._values) <= (self._marks[-1] if self._marks else 0):
            raise Unreadable("it takes a value from an empty stack")
        return self._values[-1]

    def pop(self) -> Any:
        value = self.top()
        self._values.pop()
        return value

    def pop_tuple(self, count: int) -> tuple[Any, ...]:
        """Remove the last values. Return them in the order in which they were pushed."""
        values = [self.pop() for _ in range(count)]
        return tuple(reversed(values))

    def mark(self) -> None:
        self._marks.append(len(self._values))

    def pop_marked(self) -> list[Any]:
        """Remove the last mark and all values above it. Return these values."""
        if not self._marks:
            raise Unreadable("it uses a mark that it did not set")
        start = self._marks.pop()
        found = self._values[start:]
        del self._values[start:]
        return found

    def drop(self) -> None:
        """Remove the last value or, if the last mark is above it, that mark."""
        if self._marks and len(self._values) == self._marks[-1]:
            self._marks.pop()
        else:
            self.pop()


class Machine:
    """Reads one pickle after another from ``data``.

    ``bytes``: the data, and how far it is read.
    ``storages``: all storages that the pickles name, by key.
    ``wanted``: the names that weights do not need, in the order of their first use.
    """

    def __init__(self, data: bytes) -> None:
        self.bytes = _Bytes(data)
        self.storages: dict[str, Storage] = {}
        self.wanted: dict[str, None] = {}
        self.stack = _Stack()
        self._left = MOST_INSTRUCTIONS
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """Read the next pickle. Return what it describes: plain values, and values of this module's classes.

        Raises Unreadable.
        """
        self.stack, self._memo = _Stack(), {}
        while True:
            self._spend(1)
            code = self.bytes.take(1)
            if code == pickle.STOP:
                return self.stack.pop()
            step = _STEPS.get(code)
            if step is None:
                raise Unreadable(f"instruction {code!r} at byte {self.bytes.at - 1} does not occur in weights")
            step(self)

    def _spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise Unreadable(f"more than {MOST_INSTRUCTIONS} instructions")

    # The memo.

    def put(self, place: int) -> None:
        self._memo[place] = self.stack.top()

    def memoize(self) -> None:
        self.put(len(self._memo))

    def get(self, place: int) -> None:
        if place not in self._memo:
            raise Unreadable("it reads a memo entry that it did not write")
        self.stack.push(self._memo[place])

    # Values.

    def append(self, values: list[Any]) -> None:
        target = self.stack.top()
        if type(target) is not list:
            raise Unreadable("it appends to a value that is not a list")
        cast("list[Any]", target).extend(values)

    def append_one(self) -> None:
        value = self.stack.pop()
        self.append([value])

    def set_items(self, items: list[Any]) -> None:
        target = self.stack.top()
        if type(target) is not dict or len(items) % 2:
            raise Unreadable("it sets items of a value that is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            cast("dict[Any, Any]", target)[_plain(key)] = value

    def set_item(self) -> None:
        value = self.stack.pop()
        self.set_items([self.stack.pop(), value])

    def name(self, module: Any, name: Any) -> None:
        if not _importable(module) or not _importable(name):
            raise Unreadable("it imports a name that is not an identifier")
        found = Name(module, name)
        if not found.known:
            self.wanted[f"{module}.{name}"] = None
        self.stack.push(found)

    def name_of_stack(self) -> None:
        name = self.stack.pop()
        self.name(self.stack.pop(), name)

    def call(self) -> None:
        """Push the description of the object that a name would create from its arguments."""
        arguments, name = self.stack.pop(), self.stack.pop()
        if type(name) is not Name or type(arguments) is not tuple:
            raise Unreadable("it calls a value that is not a name")
        given = cast("tuple[Any, ...]", arguments)
        match name.module, name.name:
            case "torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2":
                self.stack.push(_tensor(given))
            case "torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state":
                self.stack.push(_parameter(given))
            case "torch", "Size":
                self.stack.push(_sizes(given[0] if len(given) == 1 else None))
            case _, "OrderedDict" | "AttributeDict":
                self.stack.push({})
                self._fill(given)
            case _:
                self.stack.push(Thing(name))

    def _fill(self, given: tuple[Any, ...]) -> None:
        """Fill a dictionary from pairs. Python 2 wrote ordered dictionaries in this form."""
        pairs = given[0] if given else []
        if type(pairs) is not list or len(given) > 1:
            raise Unreadable("the argument of a dictionary is not a list of pairs")
        self._spend(len(cast("list[Any]", pairs)))
        for pair in cast("list[Any]", pairs):
            if type(pair) not in (list, tuple) or len(pair) != 2:
                raise Unreadable("the argument of a dictionary is not a list of pairs")
            self.set_items([*pair])

    def state(self) -> None:
        """Set the state of a :class:`Thing`.

        An ordered dictionary can have attributes as its state. They have no meaning for weights and are ignored.
        """
        state, target = self.stack.pop(), self.stack.top()
        if type(target) is Thing:
            target.state = state
        elif type(target) is not dict:
            raise Unreadable("it sets the state of a value that has none")

    def persistent(self) -> None:
        """Push the value of a persistent id: a storage, or (only in the old stream) a class with its source code."""
        said = self.stack.pop()
        given = cast("tuple[Any, ...]", said) if type(said) is tuple else ()
        what = given[0] if given and type(given[0]) is str else ""
        if what == "module" and len(given) == 4 and type(given[1]) is Name:
            self.stack.push(given[1])
        elif what == "storage" and len(given) in (5, 6):
            self.stack.push(self._storage(*given[1:]))
        else:
            raise Unreadable("a persistent id that is not a storage")

    def _storage(self, kind: Any, key: Any, _device: Any, elements: Any, *view: Any) -> Storage:
        """Return the storage of a persistent id. ``view``: None or absent unless it is a part of another storage."""
        sound = type(kind) is Name and kind.module == "torch" and kind.name in DTYPES
        if not sound or type(key) is not str or not _is_size(elements):
            raise Unreadable("a persistent id that is not a storage")
        if view and view[0] is not None:
            raise Unreadable("a storage that is part of another, as only the first versions of PyTorch wrote")
        found = self.storages.setdefault(key, Storage(key, DTYPES[kind.name], elements))
        if (found.dtype, found.elements) != (DTYPES[kind.name], elements):
            raise Unreadable("a storage with two dtypes or sizes")
        return found


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise Unreadable("a string that is not UTF-8") from None


def _importable(name: Any) -> bool:
    return type(name) is str and 0 < len(name) <= MOST_NAME and all(part.isidentifier() for part in name.split("."))


def _plain(key: Any) -> str | int | Name:
    """Return a key that is fast to hash. Nested tuples in a hundred bytes could take for ever."""
    if type(key) in (str, Name) or (type(key) is int and abs(key) < _LARGEST_KEY):
        return key
    raise Unreadable("a dictionary key that is neither a string nor a small integer")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _sizes(value: Any) -> tuple[int, ...]:
    if type(value) not in (tuple, list) or len(value) > MOST_AXES or not all(_is_size(n) for n in value):
        raise Unreadable("a tensor whose shape or strides are not sizes")
    return tuple(value)


def _tensor(given: tuple[Any, ...]) -> Tensor:
    """``given``: (storage, offset, shape, strides, requires_grad, hooks, metadata)."""
    if len(given) < 4 or type(given[0]) is not Storage or not _is_size(given[1]):
        raise Unreadable("a tensor without a storage")
    if len(given) > 6 and given[6]:
        raise Unreadable("a tensor that is the conjugate or negative of its storage")
    shape, strides = _sizes(given[2]), _sizes(given[3])
    if len(shape) != len(strides):
        raise Unreadable("a tensor whose shape or strides are not sizes")
    return Tensor(given[0], given[1], shape, strides)


def _parameter(given: tuple[Any, ...]) -> Tensor:
    if not given or type(given[0]) is not Tensor:
        raise Unreadable("a parameter without a tensor")
    return given[0]


def _protocol(machine: Machine) -> None:
    if machine.bytes.number("<B") > pickle.HIGHEST_PROTOCOL:
        raise Unreadable("a newer protocol")


_STEPS: Mapping[bytes, Callable[[Machine], object]] = {
    pickle.PROTO: _protocol,
    pickle.FRAME: lambda m: m.bytes.number("<Q"),
    pickle.MARK: lambda m: m.stack.mark(),
    pickle.POP: lambda m: m.stack.drop(),
    pickle.POP_MARK: lambda m: m.stack.pop_marked(),
    pickle.NONE: lambda m: m.stack.push(None),
    pickle.NEWTRUE: lambda m: m.stack.push(True),
    pickle.NEWFALSE: lambda m: m.stack.push(False),
    pickle.BININT: lambda m: m.stack.push(m.bytes.number("<i")),
    pickle.BININT1: lambda m: m.stack.push(m.bytes.number("<B")),
    pickle.BININT2: lambda m: m.stack.push(m.bytes.number("<H")),
    pickle.LONG1: lambda m: m.stack.push(m.bytes.long()),
    pickle.BINFLOAT: lambda m: m.stack.push(m.bytes.number(">d")),
    pickle.BINUNICODE: lambda m: m.stack.push(m.bytes.text("<I")),
    pickle.SHORT_BINUNICODE: lambda m: m.stack.push(m.bytes.text("<B")),
    pickle.BINSTRING: lambda m: m.stack.push(m.bytes.old_text("<i")),
    pickle.SHORT_BINSTRING: lambda m: m.stack.push(m.bytes.old_text("<B")),
    pickle.BINBYTES: lambda m: m.stack.push(m.bytes.raw("<I")),
    pickle.SHORT_BINBYTES: lambda m: m.stack.push(m.bytes.raw("<B")),
    pickle.EMPTY_TUPLE: lambda m: m.stack.push(()),
    pickle.TUPLE: lambda m: m.stack.push(tuple(m.stack.pop_marked())),
    pickle.TUPLE1: lambda m: m.stack.push(m.stack.pop_tuple(1)),
    pickle.TUPLE2: lambda m: m.stack.push(m.stack.pop_tuple(2)),
    pickle.TUPLE3: lambda m: m.stack.push(m.stack.pop_tuple(3)),
    # A set becomes a list, so that its items are not hashed.
    pickle.EMPTY_SET: lambda m: m.stack.push([]),
    pickle.ADDITEMS: lambda m: m.append(m.stack.pop_marked()),
    pickle.EMPTY_LIST: lambda m: m.stack.push([]),
    pickle.APPEND: Machine.append_one,
    pickle.APPENDS: lambda m: m.append(m.stack.pop_marked()),
    pickle.EMPTY_DICT: lambda m: m.stack.push({}),
    pickle.SETITEM: Machine.set_item,
    pickle.SETITEMS: lambda m: m.set_items(m.stack.pop_marked()),
    pickle.GLOBAL: lambda m: m.name(m.bytes.line(), m.bytes.line()),
    pickle.STACK_GLOBAL: Machine.name_of_stack,
    pickle.REDUCE: Machine.call,
    pickle.NEWOBJ: Machine.call,
    pickle.BUILD: Machine.state,
    pickle.BINPERSID: Machine.persistent,
    pickle.BINPUT: lambda m: m.put(m.bytes.number("<B")),
    pickle.LONG_BINPUT: lambda m: m.put(m.bytes.number("<I")),
    pickle.MEMOIZE: Machine.memoize,
    pickle.BINGET: lambda m: m.get(m.bytes.number("<B")),
    pickle.LONG_BINGET: lambda m: m.get(m.bytes.number("<I")),
}
"""The instructions that occur in weights. Others (byte arrays of a claimed size, instances, extensions) mean that the
file is damaged or malicious."""
