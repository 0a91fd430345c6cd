"""Writes a model's denoiser quantised, as a file that other programs read, too.

From a model in one file, the new file has all of it, in the same names; the other tensors are copied. From a model in
several files or a folder, it has the denoiser and what the original keeps in its file, in the original's names.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from safelight.catalog import paths
from safelight.catalog.identify import identify, read_header
from safelight.catalog.library import Library, refuse_taken
from safelight.catalog.model import Model
from safelight.devices.transfer import DTYPES
from safelight.diagnostics.canary import has_canary, pixels_of, request
from safelight.diagnostics.image_difference import difference
from safelight.errors import InputError
from safelight.files import gguf_writing, safetensors
from safelight.files.blocks import compact_file_name
from safelight.files.disk import flush_to_disk, open_regular, place_new, read_exactly, temporary_file_in
from safelight.files.header import MADE_FROM, TensorInfo
from safelight.weights.digest import in_module_order
from safelight.weights.file_names import FileTensor, in_original_names
from safelight.weights.manifest import ManifestTensor
from safelight.weights.quantised_file import Quantiser, TensorToWrite

ZERO_SNR = "ztsnr"
"""The tensor that says that the noise ends in nothing but noise (see the family of Stable Diffusion)."""

FEWEST_ELEMENTS = 1025
"""Smaller matrices are not quantised; ComfyUI-GGUF's converter has the same bound."""

_FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "Q5_0": 8}
"""llama.cpp's numbers of files by the form of most tensors (``general.file_type``)."""


@dataclass(slots=True)
class Written:
    """A file that was written.

    ``nbytes``: of the file.
    ``quantised``: how many tensors are quantised.
    ``error``: the root mean square of the weights' errors, divided by that of the weights.
    """

    path: Path
    nbytes: int
    quantised: int
    error: float


def make(
    library: Library,
    model: Model,
    form: str,
    out: Path | None = None,
    name: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Written, Model]:
    """Write a model's denoiser in a form, and add the file to the library.

    Components that the file lacks stay those of ``model``.
    ``out``: the file to write; None for the one of :func:`path_of`.
    ``name``: of the new model; "" for that of the file.
    An error leaves no file and no new model. Raises what :func:`write` and ``Library.add`` raise.
    """
    path = path_of(model, form, out)
    refuse_taken(library.cards(), paths.choose_name(name or None, path), path)
    written = write(model, form, path, progress)
    try:
        return written, _add(library, model, path, name)
    except BaseException:
        path.unlink()
        raise


def _add(library: Library, model: Model, path: Path, name: str) -> Model:
    """Add a file. Raises InputError if the library would use its weights in another way than those of ``model``."""
    found = identify(path)
    variant = "" if found.variant == model.variant else model.variant
    user_type: Any = model.prediction_type if model.prediction_type_from_user else None
    own = set() if found.layout is None else {component.role for component in found.layout.components}
    others = {one.role: one.digest for one in model.manifest.components if one.role not in own}
    added = library.add(path, name or None, user_type, variant=variant, wanted=others)
    for field_name in ("base", "variant", "prediction_type", "zero_terminal_snr", "resolution"):
        before, now = getattr(model, field_name), getattr(added, field_name)
        if before != now:
            library.remove(added.name)
            problem = f"its {field_name} would be {now}, and that of {model.name} is {before}"
            raise InputError(f"{path.name} does not say all that a file of {model.name} must say: {problem}")
    changed = next((role for role, digest in others.items() if added.manifest.component(role).digest != digest), None)
    if changed is not None:
        library.remove(added.name)
        raise InputError(f"the library has no {changed} with the content of that of {model.name}: add it again")
    return added


def path_of(model: Model, form: str, out: Path | None) -> Path:
    """Return the file to write: ``out``, or one beside the model's file; for a starter, in the current folder."""
    if out is not None:
        return out.expanduser().absolute()
    folder = Path.cwd() if model.origin == "starter" else model.path.parent
    return folder / compact_file_name(model.name, form)


def write(model: Model, form: str, path: Path, progress: Callable[[int, int], None] | None = None) -> Written:
    """Write a model's denoiser in a form into the new file ``path``, completely or not at all.

    ``form``: one of :data:`safelight.files.blocks.COMPACT_FORMS`.
    ``progress``: called after each tensor with the bytes that are written, and those of all tensors.

    Raises:
        InputError: ``path`` exists, or the model cannot be quantised.
        CorruptFileError: a file of the model ends too early.
        UnreadableFileError: the file cannot be written.
    """
    if os.path.lexists(path):
        raise InputError(f"{path} already exists; choose another file with --out")
    source = _only_file(model)
    if source is None and not model.family.separate_parts:
        raise _refusal(model, f"files of {model.base} are whole checkpoints, and this model is in several files")
    denoiser = {model.family.denoiser}
    inner = {one.role for one in model.manifest.components if model.family.prefix_within_denoiser(one.role)}
    for component in model.manifest.components:
        compact = next((one for one in component.tensors if one.is_compact), None)
        if compact is not None and (source is not None or component.role in denoiser | inner):
            what = f"{component.role}.{compact.name} is {compact.dtype} already"
            raise _refusal(model, f"{what}; quantise the model that it was made from")
    with contextlib.ExitStack() as stack:
        opened = _Opened(stack)
        targets = list(_from_table(model, form, opened) if source is None else _from_file(model, source, opened))
        file, temporary = stack.enter_context(temporary_file_in(path.parent))
        quantiser = Quantiser(targets, progress)
        metadata = _metadata(model)
        if form == "fp8":
            safetensors.write(file, quantiser.in_fp8(), quantiser.bytes_of, metadata)
        else:
            about: dict[str, str | int] = {"general.architecture": model.family.gguf_architecture or model.base}
            about |= {"general.file_type": _FILE_TYPES[form.upper()], "general.quantization_version": 2, **metadata}
            gguf_writing.write(file, about, quantiser.in_blocks(form.upper()), quantiser.bytes_of)
        flush_to_disk(file, temporary)
        try:
            place_new(temporary, path)
        except FileExistsError as error:
            raise InputError(f"{path} was made by another program meanwhile; choose another with --out") from error
    return Written(path, path.stat().st_size, quantiser.count, quantiser.error)


def why_not_measured(model: Model) -> str:
    """Return why no image can show the error of a model's quantised weights; "" if one can."""
    return "" if has_canary(model) else "the model draws nothing from text alone"


def measure(engine: Any, model: Model, added: Model) -> str:
    """Draw the canary with both models, and return the difference of the two images. Raises what drawing raises."""
    images = [next(engine.generate(request(one))) for one in (model, added)]
    one, other = (pixels_of(image) for image in images)
    return str(difference(one, other))


def _only_file(model: Model) -> Path | None:
    """Return the file that has all components of a model; None if they are in several files."""
    paths = {tensor.path for component in model.manifest.components for tensor in component.tensors}
    return paths.pop() if len(paths) == 1 else None


def _refusal(model: Model, problem: str) -> InputError:
    return InputError(f"{model.name} ({model.base}) cannot be quantised: {problem}")


def _metadata(model: Model) -> dict[str, str]:
    """Return what the file says of the model, by the keys that are in use (modelspec, and Safelight's own)."""
    found = {MADE_FROM: model.digest, "modelspec.resolution": f"{model.resolution}x{model.resolution}"}
    if model.prediction_type != "flow":
        found["modelspec.prediction_type"] = "v" if model.prediction_type == "v_prediction" else model.prediction_type
    known = [name for name, variant in model.family.declared_variants.items() if variant == model.variant]
    return {**found, "modelspec.architecture": known[0]} if known else found


class _Opened:
    """Files that are open until the end of ``stack``."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._descriptors: dict[Path, int] = {}

    def read(self, path: Path, name: str, offset: int, nbytes: int) -> bytes:
        if path not in self._descriptors:
            self._descriptors[path] = open_regular(path)[0]
            self._stack.callback(os.close, self._descriptors[path])
        return read_exactly(self._descriptors[path], path, name, offset, nbytes)


def _is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    matrix = len(shape) == 2 and min(shape) > 1 and math.prod(shape) >= FEWEST_ELEMENTS
    # The forms have blocks of 32 numbers of a row.
    return matrix and name.endswith(".weight") and shape[1] % 32 == 0


def _plain(dtype: str, form: str) -> str:
    """Return the dtype of a tensor that is not quantised. Other programs do not read BF16 in a denoiser's GGUF file."""
    return "F32" if dtype == "BF16" and form != "fp8" else dtype


def _from_table(model: Model, form: str, opened: _Opened) -> Iterator[TensorToWrite]:
    """Yield the tensors of the denoiser's file, in the original's names."""
    family = model.family
    for component in model.manifest.components:
        inner = family.prefix_within_denoiser(component.role)
        if component.role != family.denoiser and not inner:
            continue
        of = {tensor.name: tensor for tensor in component.tensors}
        for one in in_original_names(component.config.rows()):
            parts = [of[piece.name] for piece in one.pieces]
            dtypes = {part.dtype for part in parts}
            kept = any(component.config.keeps_fp32(part.name) for part in parts)
            quantised = component.role == family.denoiser and not kept and _is_quantised(one.name, one.shape)
            dtype = _plain(dtypes.pop(), form) if len(dtypes) == 1 else "F32"
            yield TensorToWrite(
                inner + one.name, dtype, one.shape, quantised, _reader(one, parts, DTYPES[dtype], opened)
            )


def _reader(
    one: FileTensor, parts: list[ManifestTensor], dtype: torch.dtype, opened: _Opened
) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        found: list[torch.Tensor] = []
        for piece, part in zip(one.pieces, parts, strict=True):
            data = opened.read(part.path, part.name, part.offset, part.nbytes)
            data = in_module_order(data, part.dtype, part.shape, part.transpose, part.swap_halves)
            values = torch.frombuffer(bytearray(data), dtype=DTYPES[part.dtype]).view(part.shape).to(dtype)
            if piece.source.swap_halves:
                values = torch.cat(values.chunk(2)[::-1])
            found.append(values.t() if piece.source.transpose else values)
        return torch.cat(found).reshape(one.shape) if len(found) > 1 else found[0].reshape(one.shape)

    return read


def _from_file(model: Model, path: Path, opened: _Opened) -> Iterator[TensorToWrite]:
    """Yield the tensors of a whole checkpoint that the model needs, in the names of its file, and its markers."""
    built = identify(path, variant=model.variant).layout
    assert built is not None, "a model of the library is a checkpoint"
    header = read_header(path)
    denoiser = built.component(model.family.denoiser)
    kept = {one.source for one in denoiser.tensors if denoiser.config.keeps_fp32(one.name)}
    quantisable = {one.source for one in denoiser.tensors} - kept
    used = {one.source for component in built.components for one in component.tensors}
    for name, info in header.tensors.items():
        if name in used or model.family.keep(name):
            quantised = name in quantisable and _is_quantised(name, info.shape)
            yield TensorToWrite(name, info.dtype, info.shape, quantised, _whole_reader(info, opened))
    if model.zero_terminal_snr:
        yield TensorToWrite(ZERO_SNR, "F32", (1,), False, lambda: torch.ones(1))


def _whole_reader(info: TensorInfo, opened: _Opened) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        data = opened.read(info.path, info.name, info.offset, info.nbytes)
        return torch.frombuffer(bytearray(data), dtype=DTYPES[info.dtype]).view(info.shape)

    return read
