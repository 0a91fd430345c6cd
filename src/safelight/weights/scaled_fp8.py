"""Tensors in fp8 with a scale, as ComfyUI stores them, and the tensors beside them.

Older files have ``scale_weight`` and ``scale_input`` beside a module's ``weight``, and a tensor ``scaled_fp8`` in the
file. Newer ones have ``weight_scale``, ``input_scale``, and ``comfy_quant`` with the name of the form. The number is
the stored one times the scale. The scale of the input only serves programs that multiply in fp8.
Source: QUANTIZATION.md of https://github.com/comfyanonymous/ComfyUI.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from safelight.errors import CorruptFileError, UnsupportedModelError
from safelight.files.header import TensorInfo

SCALES = ("scale_weight", "weight_scale")
INPUT_SCALES = ("scale_input", "input_scale")
SECOND_SCALE = "weight_scale_2"
FORM = "comfy_quant"
MARKER = "scaled_fp8"

FORMS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
"""safetensors' dtypes by the names in :data:`FORM`."""

FORMS_BY_DTYPE = {dtype: form for form, dtype in FORMS.items()}


@dataclass(frozen=True, slots=True)
class Scaling:
    """The tensors beside a weight. ``scale``: its scale; None if it has none. ``all``: all that are there."""

    scale: TensorInfo | None
    all: tuple[TensorInfo, ...]


NO_SCALING = Scaling(None, ())


def find_scaling(name: str, info: TensorInfo, infos: Mapping[str, TensorInfo]) -> Scaling:
    """Return the tensors that say how a weight is scaled.

    ``name``: the weight's, as in ``infos``.
    Raises UnsupportedModelError for a scale that is not one number.
    """
    if not name.endswith("weight"):
        return NO_SCALING
    stem = name.removesuffix("weight")
    found = {one: infos[stem + one] for one in (*SCALES, *INPUT_SCALES, SECOND_SCALE, FORM) if stem + one in infos}
    if not found:
        return NO_SCALING
    scales = [found[one] for one in SCALES if one in found]
    if len(scales) > 1:
        raise UnsupportedModelError(info.path, f"tensor {info.name} has two scales, {' and '.join(SCALES)}")
    for scale in scales:
        if scale.elements != 1 or SECOND_SCALE in found:
            blocks = SECOND_SCALE in found or scale.elements > max(scale.shape, default=1)
            form = "mxfp8 or nvfp4" if blocks else "one number for each row"
            problem = f"tensor {scale.name} is {scale.dtype} {list(scale.shape)}: a scale of {form}"
            raise UnsupportedModelError(info.path, f"{problem}. Only fp8 with one scale for each tensor is read")
    return Scaling(next(iter(scales), None), tuple(found.values()))


def scale_of(scaling: Scaling, dtype: str, read: Callable[[TensorInfo], bytes]) -> float | None:
    """Return the number by which a weight is multiplied, None if it is stored without one.

    ``dtype``: the weight's.
    ``read``: returns a tensor's bytes.
    Raises CorruptFileError for a scale that is not positive and finite.
    Raises UnsupportedModelError if the file says that the weight has another form.
    """
    for info in scaling.all:
        if info.name.endswith(FORM):
            _check_form(info, dtype, read(info))
    if scaling.scale is None:
        return None
    info = scaling.scale
    if info.dtype not in _UNPACK:
        raise UnsupportedModelError(info.path, f"tensor {info.name} is {info.dtype}; a scale is F32, F16 or BF16")
    number = _UNPACK[info.dtype](read(info))
    if not math.isfinite(number) or number <= 0:
        raise CorruptFileError(info.path, f"tensor {info.name} is {number}; a scale is positive and finite")
    return number


def _check_form(info: TensorInfo, dtype: str, data: bytes) -> None:
    try:
        form = json.loads(data)["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(info.path, f"tensor {info.name} is no JSON with a format ({error})") from error
    if FORMS.get(form) != dtype:
        problem = f"tensor {info.name} says {form!r}, and the weight is {dtype}"
        raise UnsupportedModelError(info.path, f"{problem}. Of these forms, {', '.join(FORMS)} are read")


_UNPACK: Mapping[str, Callable[[bytes], float]] = {
    "F32": lambda data: struct.unpack("<f", data)[0],
    "F16": lambda data: struct.unpack("<e", data)[0],
    # The upper half of an fp32 number.
    "BF16": lambda data: struct.unpack("<f", b"\0\0" + data)[0],
}


def left_over_reason(name: str, reason_of: Callable[[str], str | None]) -> str | None:
    """Return why a tensor that no module needs may be there, None if it may not.

    ``reason_of``: the same for tensors that do not belong to a form. A scale may be there if its weight may.
    """
    stem, _, end = name.rpartition(".")
    if end == MARKER:
        return "says that the file has scaled fp8"
    if end in {*SCALES, *INPUT_SCALES, SECOND_SCALE, FORM}:
        return reason_of(f"{stem}.weight")
    return reason_of(name)
