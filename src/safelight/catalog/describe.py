"""Describes a file as a model: identifies it, reads and hashes all of it, and converts pickles."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safelight import names
from safelight.catalog import convert
from safelight.catalog.composition import Composition, NamedParts, PartFinder, complete
from safelight.catalog.identify import Identity, identify
from safelight.catalog.model import Model, Origin
from safelight.errors import CorruptFileError, FileError, InputError, IntegrityError, UnsupportedModelError
from safelight.families.family import Family, PredictionType
from safelight.files import folder, pickle
from safelight.files.disk import flush_to_disk, temporary_file_in
from safelight.files.packing import weight_of
from safelight.weights import adapter_file
from safelight.weights.layout import CheckpointLayout
from safelight.weights.manifest import FileStamp, Manifest, hash_components, relocate

CONVERTED = frozenset({"pickle", "diffusers-pickle"})
"""The formats that Safelight converts before use."""

MISSING_REMEDY = (
    "Put it back, add it at its new path with `safelight models add PATH --name NAME`, or remove the model."
)

CHANGED_REMEDY = "The file changed since it was added. If you changed it, add it again with `safelight models add`."

OnBytes = Callable[[int, int], None]
"""Called with (bytes read so far, bytes in total)."""


@dataclass(frozen=True, slots=True)
class Shelf:
    """What reading a model needs of the library.

    ``conversions``: the folder of conversions, for pickles.
    ``parts``: finds components that the model's file lacks.
    """

    conversions: Path
    parts: PartFinder


@dataclass(frozen=True, slots=True)
class Choices:
    """What the user, or an earlier record, says of a model.

    ``prediction_type``, ``variant``: None and "" for the file's own.
    ``named``: the adapters or models that give components.
    ``wanted``: digests of components that were taken from other files before, by role.
    """

    prediction_type: PredictionType | None = None
    variant: str = ""
    named: NamedParts = ()
    wanted: Mapping[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def of(cls, model: Model) -> Choices:
        """Return the choices that a model's record has."""
        user_type: Any = model.prediction_type if model.prediction_type_from_user else None
        wanted = {role: model.manifest.component(role).digest for role in model.sources}
        return cls(user_type, model.variant if model.variant_from_user else "", (), wanted)


def read_model(
    shelf: Shelf, path: Path, name: str, origin: Origin, choices: Choices, on_bytes: OnBytes | None = None
) -> Model:
    """Identify a checkpoint, read and hash all of it.

    Raises FileError for a bad file, InputError when the choices do not fit.
    """
    found = identify(path, choices.prediction_type, choices.variant)
    if found.layout is None:
        what = found.kind if found.base is None else f"{found.kind} for {found.base}"
        todo = "; use `safelight adapters add`" if adapter_file.is_adapter(found.kind) else ""
        raise UnsupportedModelError(path, f"is a {what} ({found.rule}), not a supported checkpoint{todo}")
    if found.variant is None:
        ways = " or ".join(f"--variant {variant}" for variant in found.layout.family.variants)
        problem = f"is {found.base}, and nothing in it says which variant: use `safelight models add` with {ways}"
        raise UnsupportedModelError(path, problem)
    if found.format in CONVERTED:
        layout, manifest = _converted(shelf.conversions, path, found)
    else:
        layout = found.layout
        manifest = _hash_layout(path, found, _counter(found.nbytes, on_bytes))
    composition = _composed(shelf, layout, manifest, choices)
    return Model(
        name=names.canonical(name),
        path=path,
        kind=found.kind,
        base=layout.family.name,
        variant=found.variant,
        prediction_type=found.prediction_type or "",
        zero_terminal_snr=found.zero_terminal_snr,
        dtype=found.dtype,
        format=found.format,
        resolution=found.resolution or native_resolution(layout.family, found.prediction_type),
        origin=origin,
        rule=found.rule,
        prediction_type_from_user=found.prediction_type_from_user,
        manifest=composition.manifest,
        variant_from_user=found.variant_from_user,
        sources=composition.sources,
    )


def _composed(shelf: Shelf, layout: CheckpointLayout, own: Manifest, choices: Choices) -> Composition:
    """Return the complete model. ``own``: the manifest of its own file or folder."""
    if layout.missing or choices.named or choices.wanted:
        return complete(layout, own, shelf.parts, choices.wanted, choices.named)
    return Composition(own)


def read_again(shelf: Shelf, model: Model, on_bytes: OnBytes | None = None) -> Model:
    """Read and hash a model again, and return it as its files are now.

    Reads the conversion instead of its sources if these are unchanged.
    Raises IntegrityError when a file is gone, or is no longer such a model.
    """
    try:
        if model.format in CONVERTED:
            conversion, *sources = model.manifest.files
            if conversion.path.exists() and all(source.is_unchanged() for source in sources):
                layout = layout_of(conversion.path, model.variant)
                read = hash_components(layout.components, _counter(conversion.size, on_bytes))
                whole = _composed(shelf, layout, read, Choices.of(model)).manifest
                return replace(model, manifest=replace(whole, files=(*read.files, *sources)))
        return read_model(shelf, model.path, model.name, model.origin, Choices.of(model), on_bytes)
    except FileError as error:
        remedy = MISSING_REMEDY if not model.path.exists() else "Put the right file back, or add the model again."
        raise IntegrityError(error.path, "", error.problem, remedy) from error
    except InputError as error:
        raise IntegrityError(model.path, "", str(error), CHANGED_REMEDY) from error


def refuse_other_content(model: Model, current: Manifest) -> None:
    """Raise IntegrityError, with the first tensor that differs, if ``current`` and ``model`` differ in content."""
    if current.digest == model.manifest.digest:
        return
    now = {(c.role, t.name): t.xxh3 for c in current.components for t in c.tensors}
    for component in model.manifest.components:
        for tensor in component.tensors:
            if now.get((component.role, tensor.name)) != tensor.xxh3:
                name = f"{component.role}.{tensor.name}"
                raise IntegrityError(tensor.path, name, "its content changed", CHANGED_REMEDY)
    raise IntegrityError(model.path, "", "its content changed", CHANGED_REMEDY)


def _converted(conversions: Path, path: Path, found: Identity) -> tuple[CheckpointLayout, Manifest]:
    """Convert pickles. Return the layout and the manifest of the conversion.

    The manifest also lists the pickles, so that Safelight notices when they change. The folder of the conversion is
    named after its digest.
    """
    assert found.layout is not None
    left_over, family = found.layout.left_over, found.layout.family
    if found.format == "pickle":
        tensors = list(pickle.read_header(path).tensors.values())
    else:
        parts = folder.read(path, family.folders).components
        tensors = [replace(t, name=f"{place}.{t.name}") for place in parts for t in parts[place].tensors.values()]
    dropped = {name for name in left_over if not family.keep(name)}
    # What is beside a weight goes with it.
    tensors = [t for t in tensors if (weight_of(t.name) or t.name) not in dropped]
    with temporary_file_in(conversions) as (file, temporary):
        convert.to_safetensors(tensors, file)
        flush_to_disk(file, temporary)
        with convert.reporting_errors_for(path, temporary):
            layout = layout_of(temporary, found.variant or "")
            manifest = hash_components(layout.components)
        converted = conversions / manifest.digest / "model.safetensors"
        converted.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, converted)
    sources = sorted({tensor.path for tensor in tensors}.union(found.watched))
    manifest = relocate(manifest, converted)
    return layout, replace(manifest, files=(*manifest.files, *(FileStamp.of(source) for source in sources)))


def _hash_layout(path: Path, found: Identity, progress: Callable[[int], None] | None) -> Manifest:
    """Return the manifest of a checkpoint. Raises CorruptFileError if the headers changed while the bytes were read."""
    assert found.layout is not None
    manifest = hash_components(found.layout.components, progress, found.watched)
    if identify(path, variant=(found.variant or "") if found.variant_from_user else "").layout != found.layout:
        raise CorruptFileError(path, "changed while it was read; try again when its download is complete")
    return manifest


def layout_of(path: Path, variant: str) -> CheckpointLayout:
    """Return the layout of a conversion. Raises CorruptFileError when the file is not a checkpoint.

    ``variant``: of the pickle: the conversion has no settings that could name it.
    """
    found = identify(path)
    if found.layout is not None and found.variant != variant:
        found = identify(path, variant=variant)
    if found.layout is None:
        raise CorruptFileError(path, "the converted file is not a checkpoint")
    return found.layout


def _counter(total: int, on_bytes: OnBytes | None) -> Callable[[int], None] | None:
    if on_bytes is None:
        return None
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        on_bytes(done, total)

    return count


def native_resolution(family: Family, prediction_type: PredictionType | None) -> int:
    own = family.native_size(prediction_type) if prediction_type is not None else None
    return own or family.resolution


def find_earlier_content(shelf: Shelf, earlier: Model, on_bytes: OnBytes | None) -> Model | None:
    """Find the content of an earlier record, and read and hash it: in its own files, in its conversion, or in a file of
    the same size in the same folder. Returns None if it is gone."""
    return next((model for model in _candidates(shelf, earlier, on_bytes) if model.digest == earlier.digest), None)


def _candidates(shelf: Shelf, earlier: Model, on_bytes: OnBytes | None) -> Iterator[Model]:
    """Yield models that may have the content of ``earlier``. Reads all their bytes."""
    beside: list[Path] = []
    if earlier.path.parent.is_dir() and earlier.format not in CONVERTED:
        size = sum(stamp.size for stamp in earlier.manifest.files if stamp.path == earlier.path)
        files = (path for path in sorted(earlier.path.parent.iterdir()) if path.is_file() and path != earlier.path)
        beside = [path for path in files if path.stat().st_size == size]
    if earlier.format in CONVERTED and earlier.manifest.files[0].is_unchanged():
        read = hash_components(layout_of(earlier.manifest.files[0].path, earlier.variant).components)
        yield replace(earlier, manifest=replace(read, files=read.files))
    for path in (earlier.path, *beside):
        with contextlib.suppress(InputError):
            yield read_model(shelf, path, earlier.name, "added", Choices.of(earlier), on_bytes)
