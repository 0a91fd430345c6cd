"""Packed weights of safetensors files and pickles: quantised numbers whose scales are in tensors beside them.

A reader of headers lists each tensor of a file. Here a weight and the tensors beside it become one tensor, with the
shape that its module has. docs/forms.md has the names of these tensors and the arithmetic of each form.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safelight.errors import CorruptFileError, UnsupportedModelError
from safelight.files.disk import open_regular, read_exactly
from safelight.files.header import Beside, Header, Packing, TensorInfo

PACKED = ("INT8", "MXFP8", "NVFP4", "NF4", "FP4")
"""The forms that this module makes of plain dtypes. fp8 keeps its dtype's name."""

FP8 = ("F8_E4M3", "F8_E5M2")

MX_GROUP = 32
"""Numbers of a row that share a scale in mxfp8."""

NV_GROUP = 16
"""The same in nvfp4."""

TILE = 128
"""Rows and columns that share a scale in fp8 with a scale for each tile."""

SWIZZLED_ROWS, SWIZZLED_COLUMNS = 128, 4
"""cuBLAS stores scales of groups in tiles of this size."""

MOST_ROW_ELEMENTS = 1 << 19
"""Numbers of a row. No layer has more, and a chunk of numbers that is dequantised at once has whole rows."""

MOST_BLOCK_ELEMENTS = 4096
"""Numbers of a block of nf4 or fp4; bitsandbytes has no larger ones."""

SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
INPUT_SCALES = ("scale_input", "input_scale")
SECOND_SCALE = "weight_scale_2"
COLUMN_SCALE = "pre_quant_scale"
ROW_MAXIMA = "SCB"
LAYOUT = "weight_format"
FORM = "comfy_quant"
MARKER = "scaled_fp8"
METADATA = "_quantization_metadata"

_ENDS = (*SCALES, *INPUT_SCALES, SECOND_SCALE, COLUMN_SCALE, ROW_MAXIMA, LAYOUT, FORM)
"""Ends of the names of tensors beside a module's ``weight``."""

_BITSANDBYTES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_STATE = "quant_state.bitsandbytes__"

FORMS: Mapping[str, tuple[str, ...]] = {
    "float8_e4m3fn": ("F8_E4M3", "U8"),
    "float8_e5m2": ("F8_E5M2", "U8"),
    "mxfp8": ("F8_E4M3", "U8"),
    "nvfp4": ("U8",),
    "int8_tensorwise": ("I8",),
}
"""Names of forms in :data:`FORM`, and the dtypes that weights of the form have."""

FORMS_BY_DTYPE = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}

_PACKED_FORMS = {
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "int8_tensorwise": "INT8",
}

_ROTATION = frozenset({"convrot", "convrot_groupsize"})
_WITHOUT_EFFECT = frozenset({"format", "full_precision_matrix_mult", "per_row", "per_channel", "group_size"})
"""Settings that follow from the tensors, or only serve programs which multiply quantised numbers."""

_INT8_STEP = 7.874015718698502e-3
"""bitsandbytes multiplies by this constant, about 1 / 127."""

_LARGEST_SETTINGS = 1 << 16
"""Bytes of a tensor with JSON."""

_NOT_JSON = (ValueError, KeyError, TypeError, OverflowError, RecursionError)
"""What Python raises for JSON that cannot be read, lacks a value, or has another one than it must have."""

Read = Callable[[TensorInfo], bytes]


def find_packed(header: Header) -> Header:
    """Return the header with each packed weight as one tensor.

    Raises CorruptFileError for settings that cannot be read, and for a scale that is not positive and finite.
    Raises UnsupportedModelError for a form that is not read.
    """
    infos = header.tensors
    stems = _stems(infos)
    declared = _declared(header)
    if not stems and not declared and not any(_is_marker(name) for name in infos):
        return header
    with _Files() as files:
        found: dict[str, TensorInfo] = {}
        used: set[str] = set()
        for stem, beside in stems.items():
            weight = infos.get(f"{stem}weight")
            if weight is None:
                continue
            group = _Group(weight, stem, beside, files.read, declared.get(weight.name))
            found[weight.name] = group.packed()
            used.update(info.name for info in beside.values())
    tensors = {name: found.get(name, info) for name, info in infos.items() if name not in used and not _is_marker(name)}
    return replace(header, tensors=tensors)


def _is_marker(name: str) -> bool:
    return name == MARKER or name.endswith(f".{MARKER}")


def weight_of(name: str) -> str | None:
    """Return the name of the weight that a tensor is beside; None for a tensor that stands for itself."""
    found = _split(name)
    return None if found is None else f"{found[0]}weight"


def _split(name: str) -> tuple[str, str] | None:
    """Return the start of a weight's name, and the end of the name of a tensor beside it; None for other tensors."""
    stem, _, end = name.rpartition(".")
    if end in _ENDS:
        return f"{stem}." if stem else "", end
    module, is_state, form = name.partition(f".weight.{_STATE}")
    if is_state:
        return f"{module}.", _STATE + form
    return (stem.removesuffix("weight"), end) if end in _BITSANDBYTES and stem.endswith("weight") else None


def _stems(infos: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Return the tensors beside weights: by the start of the weight's name, then by the end of their own."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in infos.items():
        if (parts := _split(name)) is not None:
            found.setdefault(parts[0], {})[parts[1]] = info
    return found


def _layers(path: Path, text: str) -> dict[str, Any]:
    """Read the settings of layers from the metadata. Raises CorruptFileError."""
    try:
        return dict(json.loads(text)["layers"].items())
    except (*_NOT_JSON, AttributeError) as error:
        raise CorruptFileError(path, f"{METADATA} in its metadata is no JSON with layers ({error})") from error


def merge_metadata(path: Path, shards: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Return the metadata of several shards: each may have the settings of its own layers.

    ``path``: to name in errors.
    Raises CorruptFileError if two shards have different settings for a layer.
    """
    merged: dict[str, str] = {}
    layers: dict[str, Any] = {}
    for metadata in shards:
        merged |= metadata
        for name, settings in _layers(path, metadata[METADATA]).items() if METADATA in metadata else ():
            if layers.setdefault(name, settings) != settings:
                raise CorruptFileError(path, f"two of its shards have different settings for {name} in {METADATA}")
    return merged | ({METADATA: json.dumps({"layers": layers})} if layers else {})


def _declared(header: Header) -> dict[str, Any]:
    """Return the settings of weights that the file's metadata has, by the weight's name.

    The metadata may lack a prefix that all names of the file have: then it is the one with which most layers are there.
    """
    if METADATA not in header.metadata:
        return {}
    layers = _layers(header.path, header.metadata[METADATA])
    prefixes: Counter[str] = Counter()
    for name in header.tensors:
        module, found, _ = name.rpartition(".weight")
        at = 0
        while found and at >= 0:
            prefixes[module[:at]] += module[at:] in layers
            at = module.find(".", at) + 1 or -1
    if not prefixes:
        return {}
    prefix = max(prefixes, key=lambda one: (prefixes[one], -len(one)))
    return {f"{prefix}{layer}.weight": settings for layer, settings in layers.items()}


class _Files:
    """Reads small tensors, and opens each file once."""

    def __init__(self) -> None:
        self._opened: dict[Any, int] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._opened.values():
            os.close(descriptor)

    def read(self, info: TensorInfo) -> bytes:
        """Return a tensor's bytes. Raises CorruptFileError if the file is too short, or the tensor is too large."""
        if info.nbytes > _LARGEST_SETTINGS:
            raise CorruptFileError(info.path, f"tensor {info.name} has {info.nbytes} bytes, too many for its purpose")
        if info.path not in self._opened:
            self._opened[info.path] = open_regular(info.path)[0]
        return read_exactly(self._opened[info.path], info.path, info.name, info.offset, info.nbytes)


@dataclass(slots=True)
class _Group:
    """A weight and the tensors beside it.

    ``stem``: the start of their names.
    ``beside``: by the end of their names.
    ``declared``: the weight's settings in the file's metadata; None if it has none.
    """

    weight: TensorInfo
    stem: str
    beside: Mapping[str, TensorInfo]
    read: Read
    declared: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def packed(self) -> TensorInfo:
        """Return the weight as one tensor of its form."""
        if any(end.startswith(_STATE) or end in _BITSANDBYTES for end in self.beside):
            return self._bitsandbytes_4_bit()
        if ROW_MAXIMA in self.beside:
            return self._bitsandbytes_8_bit()
        form = self._form()
        rotated = self._rotated(form)
        self._refuse_all_but(FORM, COLUMN_SCALE, *SCALES, *([SECOND_SCALE] if form == "NVFP4" else []))
        if form == "NVFP4":
            return self._nvfp4()
        if form == "MXFP8":
            return self._mxfp8()
        scale = self._scale_tensor()
        packing = Packing(group=rotated)
        if scale is not None:
            packing = self._scaled(packing, scale)
        elif form == "INT8":
            raise self._unsupported(f"is {self.weight.dtype} and has no scale")
        return self._with(form, self.weight.shape, packing)

    def _refuse_all_but(self, *ends: str) -> None:
        """Raise UnsupportedModelError for a tensor beside the weight that its form does not use."""
        odd = [info.name for end, info in self.beside.items() if end not in (*ends, *INPUT_SCALES)]
        if odd:
            raise self._unsupported(f"has {odd[0]} beside it, which its form does not use")

    def _form(self) -> str:
        """Return the weight's form, from its settings or its dtype."""
        said = self._settings()
        if said is not None:
            dtypes = FORMS.get(said)
            name = self.beside[FORM].name if FORM in self.beside else f"{METADATA} of {self.weight.name}"
            if dtypes is None:
                raise UnsupportedModelError(
                    self.weight.path, f"{name} says {said!r}, which is not read. {', '.join(FORMS)} are"
                )
            if self.weight.dtype not in dtypes:
                raise UnsupportedModelError(
                    self.weight.path, f"{name} says {said!r}, and the weight is {self.weight.dtype}"
                )
            return _PACKED_FORMS[said]
        scale = self._scale_tensor()
        if self.weight.dtype == "U8" and SECOND_SCALE in self.beside:
            return "NVFP4"
        if self.weight.dtype == "F8_E4M3" and scale is not None and scale.dtype in ("U8", "F8_E8M0"):
            return "MXFP8"
        if self.weight.dtype == "I8":
            return "INT8"
        if scale is not None and self.weight.dtype not in (*FP8, "F32", "F16", "BF16"):
            raise self._unsupported(f"is {self.weight.dtype}, and nothing says in which form")
        return self.weight.dtype

    def _settings(self) -> str | None:
        """Read the weight's settings. Return the name of its form, None if it has none."""
        if FORM not in self.beside and self.declared is None:
            return None
        where = f"{METADATA} in its metadata" if FORM not in self.beside else f"tensor {self.beside[FORM].name}"
        try:
            found: Any = json.loads(self.read(self.beside[FORM])) if FORM in self.beside else self.declared
            said = found["format"]
        except _NOT_JSON as error:
            problem = f"{where} is no JSON with a format for {self.weight.name} ({error})"
            raise CorruptFileError(self.weight.path, problem) from error
        if self.declared not in (None, found):
            raise self._unsupported(f"has other settings in {METADATA} than in {FORM}")
        self.settings = found
        odd = [key for key in self.settings if key not in _WITHOUT_EFFECT | _ROTATION and self.settings[key]]
        if odd:
            raise self._unsupported(f"has the setting {odd[0]!r}, which is not read")
        return str(said)

    def _rotated(self, form: str) -> int:
        """Return how many numbers of a row are rotated together, 0 for none."""
        if not self.settings.get("convrot"):
            return 0
        size = self.settings.get("convrot_groupsize", 256)
        columns = self.weight.shape[-1] if len(self.weight.shape) == 2 else 0
        power = isinstance(size, int) and size >= 4 and size == 4 ** round(math.log(size, 4))
        if form != "INT8" or not power or not columns or columns % size:
            problem = f"is {form} {list(self.weight.shape)}, rotated in groups of {size!r}"
            raise self._unsupported(f"{problem}. Only int8 matrices with groups of a power of 4 are read")
        return size

    def _scale_tensor(self) -> TensorInfo | None:
        found = [self.beside[end] for end in SCALES if end in self.beside]
        if len(found) > 1:
            raise self._unsupported(f"has two scales, {' and '.join(info.name for info in found)}")
        return found[0] if found else None

    def _scaled(self, packing: Packing, scale: TensorInfo) -> Packing:
        """Return the packing with a scale: of the whole tensor, of each row, or of each tile."""
        rows, columns = self.weight.shape[:1], math.prod(self.weight.shape[1:])
        if scale.dtype not in _UNPACK:
            problem = f"tensor {scale.name} is {scale.dtype}; a scale is F32, F16 or BF16"
            raise UnsupportedModelError(scale.path, problem)
        if scale.elements == 1:
            return replace(packing, scale=self._number(scale))
        if len(self.weight.shape) > 1 and (scale.elements,) == rows and scale.shape[:1] == rows:
            return self._add(packing, "row_scale", scale)
        tiles = (math.ceil(rows[0] / TILE), math.ceil(columns / TILE)) if rows else ()
        if len(self.weight.shape) == 2 and scale.shape == tiles and self.weight.dtype in FP8:
            return self._add(replace(packing, group=TILE), "tile_scale", scale)
        problem = f"tensor {scale.name} is {scale.dtype} {list(scale.shape)}"
        raise UnsupportedModelError(
            scale.path, f"{problem}. One scale for {self.weight.name}, for each row, or for each {TILE}×{TILE} are read"
        )

    def _number(self, info: TensorInfo) -> float:
        """Return a scale of the whole tensor."""
        if info.dtype not in _UNPACK or info.elements != 1:
            problem = f"tensor {info.name} is {info.dtype} {list(info.shape)}; one F32, F16 or BF16 is read"
            raise UnsupportedModelError(info.path, problem)
        number = _UNPACK[info.dtype](self.read(info))
        if not math.isfinite(number) or number <= 0:
            raise CorruptFileError(info.path, f"tensor {info.name} is {number}; a scale is positive and finite")
        return number

    def _nvfp4(self) -> TensorInfo:
        shape = self._matrix(2)
        second = self.beside.get(SECOND_SCALE)
        if second is None:
            raise self._unsupported(f"is nvfp4 and has no {SECOND_SCALE}")
        packing = Packing(scale=self._number(second), group=NV_GROUP)
        return self._with("NVFP4", shape, self._add_groups(packing, shape, ("F8_E4M3", "U8"), "F8_E4M3"))

    def _mxfp8(self) -> TensorInfo:
        shape = self._matrix(1)
        packing = Packing(group=MX_GROUP)
        return self._with("MXFP8", shape, self._add_groups(packing, shape, ("F8_E8M0", "U8"), "F8_E8M0"))

    def _matrix(self, packed: int) -> tuple[int, ...]:
        """Return the shape of a matrix with ``packed`` numbers in a byte."""
        if len(self.weight.shape) != 2:
            raise self._unsupported(f"is {list(self.weight.shape)}; only matrices have this form")
        return (self.weight.shape[0], self.weight.shape[1] * packed)

    def _add_groups(self, packing: Packing, shape: tuple[int, ...], dtypes: tuple[str, ...], dtype: str) -> Packing:
        """Return the packing with a scale for each group of numbers.

        ``dtypes``: the dtypes that the tensor with the scales may have.
        ``dtype``: the dtype in which it is read.
        """
        scale = self._scale_tensor()
        if scale is None:
            raise self._unsupported("has no scales beside it")
        rows = math.ceil(shape[0] / SWIZZLED_ROWS) * SWIZZLED_ROWS
        groups = math.ceil(shape[1] / packing.group / SWIZZLED_COLUMNS) * SWIZZLED_COLUMNS
        if scale.dtype not in dtypes or scale.nbytes != rows * groups or shape[1] % packing.group:
            problem = f"tensor {scale.name} is {scale.dtype} {list(scale.shape)}; {self.weight.name} {list(shape)}"
            raise UnsupportedModelError(scale.path, f"{problem} needs {rows * groups} bytes of {' or '.join(dtypes)}")
        return self._add(packing, "group_scale", replace(scale, dtype=dtype))

    def _bitsandbytes_8_bit(self) -> TensorInfo:
        self._refuse_all_but(ROW_MAXIMA, LAYOUT)
        maxima = self.beside[ROW_MAXIMA]
        if LAYOUT in self.beside:
            said = int.from_bytes(self.read(self.beside[LAYOUT])[:8], "little")
            if said:
                raise self._unsupported(f"has weight_format {said}; only rows in order (0) are read")
        if self.weight.dtype != "I8" or maxima.dtype != "F32" or maxima.shape != self.weight.shape[:1]:
            problem = f"is {self.weight.dtype} {list(self.weight.shape)}, and its SCB {maxima.dtype}"
            raise self._unsupported(f"{problem} {list(maxima.shape)}; bitsandbytes' int8 has an F32 for each row")
        return self._with("INT8", self.weight.shape, self._add(Packing(scale=_INT8_STEP), "row_scale", maxima))

    def _bitsandbytes_4_bit(self) -> TensorInfo:
        states = [end for end in self.beside if end.startswith(_STATE)]
        self._refuse_all_but(*_BITSANDBYTES, *states)
        lacking = [end for end in ("absmax", "quant_map") if end not in self.beside]
        if len(states) != 1 or lacking:
            wanted = lacking[0] if lacking else f"one {_STATE}…"
            raise self._unsupported(f"has tensors of bitsandbytes beside it, but not {wanted}")
        state = self.beside[states[0]]
        try:
            settings = json.loads(self.read(state))
            kind, group = str(settings["quant_type"]), int(settings["blocksize"])
            shape = tuple(int(size) for size in settings["shape"])
            offset = float(settings.get("nested_offset", 0.0))
            nested = int(settings.get("nested_blocksize", 0))
        except _NOT_JSON as error:
            raise CorruptFileError(state.path, f"tensor {state.name} is not a quant_state ({error})") from error
        if kind not in ("nf4", "fp4"):
            raise self._unsupported(f"is bitsandbytes' {kind!r}; nf4, fp4 and int8 are read")
        count = math.prod(shape)
        fits = 0 < group <= MOST_BLOCK_ELEMENTS and group % 2 == 0 and min(shape, default=0) > 0 and count % group == 0
        if not fits or self.weight.dtype != "U8" or self.weight.nbytes * 2 != count or not math.isfinite(offset):
            problem = f"is {self.weight.dtype} {list(self.weight.shape)}, and its quant_state says {list(shape)}"
            raise CorruptFileError(self.weight.path, f"tensor {self.weight.name} {problem} in blocks of {group}")
        packing = self._with_codes(Packing(elements=group, group=group), "map", "quant_map", 16)
        absmax, blocks = self.beside["absmax"], count // group
        if absmax.elements != blocks or absmax.dtype not in ("U8", "F32"):
            problem = f"tensor {absmax.name} is {absmax.dtype} {list(absmax.shape)}; {blocks} blocks need one each"
            raise CorruptFileError(absmax.path, problem)
        packing = self._add(packing, "absmax", absmax)
        if absmax.dtype == "U8":
            packing = self._with_codes(
                replace(packing, offset=offset, nested=nested), "nested_map", "nested_quant_map", 256
            )
            packing = self._with_codes(packing, "nested_absmax", "nested_absmax", math.ceil(blocks / max(nested, 1)))
        return self._with(kind.upper(), shape, packing)

    def _with_codes(self, packing: Packing, kind: str, end: str, count: int) -> Packing:
        """Return the packing with a list of ``count`` fp32 numbers."""
        info = self.beside.get(end)
        if info is None or info.dtype != "F32" or info.elements != count:
            found = "missing" if info is None else f"{info.dtype} {list(info.shape)}"
            raise CorruptFileError(self.weight.path, f"{self.weight.name}.{end} is {found}; {count} F32 are needed")
        return self._add(packing, kind, info)

    def _add(self, packing: Packing, kind: str, info: TensorInfo) -> Packing:
        if info.strides is not None:
            raise UnsupportedModelError(info.path, f"tensor {info.name} is not contiguous")
        beside = Beside(kind, info.name, info.dtype, info.path, info.offset, info.nbytes)
        return replace(packing, beside=(*packing.beside, beside))

    def _with(self, form: str, shape: tuple[int, ...], packing: Packing) -> TensorInfo:
        """Return the weight in its form, with a scale for each column if there is one."""
        columns = self.beside.get(COLUMN_SCALE)
        if columns is not None:
            if len(shape) != 2 or columns.elements != shape[1] or columns.dtype not in _UNPACK:
                problem = f"tensor {columns.name} is {columns.dtype} {list(columns.shape)}"
                raise UnsupportedModelError(columns.path, f"{problem}; {self.weight.name} has {shape[-1]} columns")
            packing = self._add(packing, "column_scale", columns)
        if math.prod(shape[1:]) > MOST_ROW_ELEMENTS:
            raise self._unsupported(f"has rows of {math.prod(shape[1:])} numbers; the limit is {MOST_ROW_ELEMENTS}")
        if packing == Packing():
            return replace(self.weight, dtype=form)
        if form not in ("NF4", "FP4") and (packing.beside or packing.group):
            packing = replace(packing, elements=math.prod(shape[1:]))
        return replace(self.weight, dtype=form, shape=shape, packing=packing)

    def _unsupported(self, problem: str) -> UnsupportedModelError:
        return UnsupportedModelError(self.weight.path, f"tensor {self.weight.name} {problem}")


_UNPACK: Mapping[str, Callable[[bytes], float]] = {
    "F32": lambda data: struct.unpack("<f", data)[0],
    "F16": lambda data: struct.unpack("<e", data)[0],
    # The upper half of an fp32 number.
    "BF16": lambda data: struct.unpack("<f", b"\0\0" + data)[0],
}
