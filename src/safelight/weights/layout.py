"""The layout of a checkpoint: for every tensor that its modules need, the file and the offset of its bytes.

The shapes decide the settings of each component; the family decides everything that does not follow from shapes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safelight.errors import IncompleteModelError, UnsupportedModelError
from safelight.families.components import Component, Config, SingleFileComponent
from safelight.families.family import Family
from safelight.families.tables import NotThisArchitecture, TensorRow, TensorSource
from safelight.families.tokenizer_file import TokenizerFile
from safelight.files.blocks import BLOCKS
from safelight.files.header import Header, Packing, TensorInfo
from safelight.files.packing import FP8, PACKED
from safelight.request.adapters import Purpose
from safelight.weights.wrong_shapes import RecordedShapes, find_misleading

FLOATS = frozenset({"F32", "F16", "BF16"})

READABLE = FLOATS | {*FP8, *PACKED} | BLOCKS.keys()
"""The forms of the tensors that components may have."""


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """A tensor under its module's name, and where its bytes are.

    ``shape``: the shape in the module.
    ``offset``, ``nbytes``: bytes in ``path``.
    ``transpose``: the file stores the matrix transposed.
    ``source``: the tensor's name in the file.
    ``swap_halves``: the file stores the second half of the rows before the first.
    ``packing``: see :class:`TensorInfo`.

    For a pickle, the locations only serve to check that no tensor is missing; do not read bytes with them. Safelight
    reads the safetensors copy.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    transpose: bool = False
    source: str = ""
    swap_halves: bool = False
    packing: Packing | None = None

    @property
    def label(self) -> str:
        """The tensor's name in the file, with the module's name in brackets if it differs."""
        return labelled(self.source or self.name, self.name)


def labelled(theirs: str, ours: str) -> str:
    """Return a tensor's name in the user's file, with the module's name in brackets if it differs."""
    return theirs if theirs == ours or theirs.endswith(f".{ours}") else f"{theirs} ({ours})"


@dataclass(frozen=True, slots=True)
class ComponentLayout:
    """The layout of one component.

    ``role``: its name in records.
    ``tensors``: in the order in which a forward pass uses them.
    ``tokenizer``: where the tokenizer of a text encoder is; None for others.
    ``home``: the folder or file of the checkpoint.
    """

    role: str
    config: Config
    tensors: tuple[TensorLocation, ...]
    tokenizer: TokenizerFile | None = None
    home: Path = Path()

    def tokenizer_path(self) -> Path | None:
        """Return the path of the checkpoint's own tokenizer, None if it needs none. Raises UnsupportedModelError."""
        return None if self.tokenizer is None else self.tokenizer.own(self.home)

    @property
    def nbytes(self) -> int:
        beside = sum(location.packing.nbytes for location in self.tensors if location.packing is not None)
        return beside + sum(location.nbytes for location in self.tensors)


@dataclass(frozen=True, slots=True)
class CheckpointLayout:
    """The layout of a checkpoint.

    ``left_over``: tensors that no module needs, with the reason why each is allowed.
    ``variant``: decides which components it has; None if it is unknown: those of all variants.
    """

    path: Path
    family: Family
    components: tuple[ComponentLayout, ...]
    left_over: Mapping[str, str]
    variant: str | None

    def component(self, role: str) -> ComponentLayout:
        return next(component for component in self.components if component.role == role)

    @property
    def missing(self) -> tuple[str, ...]:
        """The roles of components that other files must give."""
        own = {component.role for component in self.components}
        return tuple(role for role in self.family.roles_of(self.variant or "") if role not in own)


def split(header: Header, family: Family) -> dict[str, dict[str, TensorInfo]]:
    """Return the tensors of each component of a single file, without their prefixes.

    With ``separate_parts``, only the denoiser must be there. A component ``within`` another gets the tensors of both.
    Raises IncompleteModelError when a component has no tensors.
    """
    parts: dict[str, dict[str, TensorInfo]] = {}
    for component in family.components:
        for prefix in component.prefixes:
            found = {name[len(prefix) :]: info for name, info in header.tensors.items() if name.startswith(prefix)}
            if found and component.role not in parts and _may_have(family, component, found):
                parts[component.role] = found
        optional = family.separate_parts and component.role != family.denoiser
        if component.role not in parts and not optional:
            wanted = component.prefixes[0] + "*"
            what = f"{family.name} checkpoint (no {component.role})"
            raise IncompleteModelError(header.path, what, missing=(wanted,))
    return parts


def _may_have(family: Family, component: Component, names: Iterable[str]) -> bool:
    """Return whether a file may have a component. ``names``: of its tensors, without the component's prefix."""
    if not component.within:
        return True
    return any(part.fits(list(names)) for part in family.single_file_components if part.role == component.role)


def build(
    path: Path,
    family: Family,
    parts: Mapping[str, Mapping[str, TensorInfo]],
    names: Iterable[str],
    variant_of: Callable[[Mapping[str, Config]], str | None],
) -> CheckpointLayout:
    """Return the layout of a checkpoint.

    ``parts``: the tensors of each component, by role.
    ``names``: the names of all tensors in its files.
    ``variant_of``: names the variant, from the settings of the components that all variants have, by role.
    Raises IncompleteModelError when tensors are missing, have a wrong shape, or are unknown. The error lists them.
    Raises UnsupportedModelError when the components are complete but do not fit together.
    """
    what = f"{family.name} checkpoint"
    by_role = {
        one.role: _built(path, what, one, parts[one.role]) for one in family.components_of("") if one.role in parts
    }
    faulty = any(one.missing or one.mismatched for one in by_role.values())
    variant = None if faulty else variant_of({role: one.component.config for role, one in by_role.items()})
    of_variant = [one for one in family.components_of(variant or "") if one.role in parts]
    built = [by_role.get(one.role) or _built(path, what, one, parts[one.role]) for one in of_variant]
    components = [_with_settings(part.component, family, variant) for part in built]
    used = {location for part in built for location in part.used}
    missing = [name for part in built for name in part.missing]
    mismatched = [name for part in built for name in part.mismatched]
    seen = {name for _, name in used}
    left_over = {name: family.left_over(name) for name in names if name not in seen}
    unexpected = [name for name, why in left_over.items() if why is None]
    if missing or mismatched or unexpected:
        raise IncompleteModelError(path, what, missing, mismatched, unexpected)
    problem = family.find_mismatch({component.role: component.config for component in components})
    if problem is not None:
        raise UnsupportedModelError(path, f"its components do not fit together: {problem}")
    return CheckpointLayout(
        path, family, tuple(components), {name: why or "" for name, why in left_over.items()}, variant
    )


def _with_settings(component: ComponentLayout, family: Family, variant: str | None) -> ComponentLayout:
    """Return a component with the settings that its variant decides."""
    known = family.variants.get(variant or "")
    settings: Mapping[str, Any] = {} if known is None else known.settings.get(component.role, {})
    return replace(component, config=replace(component.config, **settings)) if settings else component


def single_file_layout(
    path: Path, part: SingleFileComponent, family: Family, infos: Mapping[str, TensorInfo]
) -> tuple[ComponentLayout, ...]:
    """Return the layout of a file with one component, such as a VAE or a ControlNet, and with those within it.

    Raises IncompleteModelError as :func:`build` does.
    """
    component = family.component_in(part)
    # ``_built`` does not read the purpose, so the same one serves for ControlNets and VAEs.
    plain = Component(part.kind, Purpose.CONTROL, (), part.infer)
    if component is not None:
        plain = replace(plain, standard=component.standard, tokenizer=component.tokenizer)
    built = [_built(path, part.what, plain, infos)]
    for beside in family.single_file_components:
        inner = family.component_in(beside)
        if component is not None and inner is not None and inner.within == component.role and beside.fits(list(infos)):
            built.append(_built(path, part.what, inner, infos))
    used = {name for one in built for _, name in one.used}
    reason = part.left_over or family.left_over
    unexpected = [info.name for info in infos.values() if info.name not in used and reason(info.name) is None]
    missing = [name for one in built for name in one.missing]
    mismatched = [name for one in built for name in one.mismatched]
    if missing or mismatched or unexpected:
        raise IncompleteModelError(path, part.what, missing, mismatched, unexpected)
    return tuple(one.component for one in built)


@dataclass(frozen=True, slots=True)
class _Built:
    component: ComponentLayout
    used: frozenset[tuple[Path, str]]
    missing: tuple[str, ...]
    mismatched: tuple[str, ...]


def _built(path: Path, what: str, part: Component, infos: Mapping[str, TensorInfo]) -> _Built:
    """Build one component and collect its faults. ``what``: the name of the file's kind in errors."""
    role = part.role
    shapes = RecordedShapes({name: info.shape for name, info in infos.items()})
    try:
        config = part.infer(shapes)
    except (NotThisArchitecture, KeyError) as error:
        raise _not_inferred(path, what, part, infos, shapes, error) from error
    used: set[tuple[Path, str]] = set()
    wrong: dict[str, str] = {}
    locations: list[TensorLocation] = []
    table = list(config.rows())
    for row in table:
        source = next((source for source in row.sources if source.name in infos), None)
        if source is None:
            continue
        info = infos[source.name]
        used.add((info.path, info.name))
        if info.dtype not in READABLE:
            # Before the shape: packed numbers have another one.
            problem = f"tensor {info.name} is {info.dtype}; {', '.join(sorted(READABLE))} are read"
            raise UnsupportedModelError(path, problem)
        if not source.fits(row.shape, info.shape):
            wrong[source.name] = _wrong_shape(role, row, source, info)
        elif (problem := _block_problem(row, source, info)) is not None:
            raise UnsupportedModelError(path, f"tensor {info.name} is {info.dtype}, and {problem}")
        else:
            locations.append(_location(row, source, info))
    mismatched = _mismatched(part, wrong, shapes, infos) if wrong else ()
    missing = _missing(role, table, infos)
    component = ComponentLayout(role, config, tuple(locations), part.tokenizer, path if part.tokenizer else Path())
    return _Built(component, frozenset(used), missing, mismatched)


def _mismatched(
    part: Component, wrong: Mapping[str, str], shapes: RecordedShapes, infos: Mapping[str, TensorInfo]
) -> tuple[str, ...]:
    """Return what is said of tensors of a wrong shape. ``wrong``: what is said of each, by its name in the file.

    If one tensor misled the inference of the settings, the others are right, and only it is named.
    """
    misleading = find_misleading(part.infer, shapes, wrong)
    if misleading is None:
        # First those that the settings were inferred from: they may be the cause of the others.
        return tuple(wrong[name] for name in sorted(wrong, key=lambda name: name not in shapes.read))
    found = {
        source.name: _wrong_shape(part.role, row, source, infos[source.name])
        for row in misleading.rows()
        for source in row.sources
        if source.name in infos and not source.fits(row.shape, infos[source.name].shape)
    }
    if len(wrong) == 1:
        # Two tensors disagree, and nothing says which of them is right.
        return (", or ".join([*wrong.values(), *found.values()]),)
    return tuple(found.values())


def _wrong_shape(role: str, row: TensorRow, source: TensorSource, info: TensorInfo) -> str:
    return f"{labelled(info.name, f'{role}.{row.name}')}: {list(info.shape)} instead of {_in_file(row, source)}"


def _not_inferred(
    path: Path,
    what: str,
    part: Component,
    infos: Mapping[str, TensorInfo],
    shapes: RecordedShapes,
    error: NotThisArchitecture | KeyError,
) -> IncompleteModelError:
    """Return the error of a component whose settings cannot be inferred: a tensor is missing, or has a wrong shape."""
    cause = error if isinstance(error, KeyError) else error.__cause__
    if isinstance(error, NotThisArchitecture) and not isinstance(cause, KeyError):
        name = error.tensor or next(reversed(shapes.read), "")
        if name:
            wrong = f"{labelled(infos[name].name, f'{part.role}.{name}')}: {list(infos[name].shape)} ({error})"
            return IncompleteModelError(path, what, mismatched=(wrong,))
    lacked = str(cause.args[0]) if isinstance(cause, KeyError) else ""
    missing = () if part.standard is None else _missing(part.role, part.standard.rows(), infos, lacked)
    return IncompleteModelError(path, what, missing=missing or (f"{part.role}: {error}",))


def _in_file(row: TensorRow, source: TensorSource) -> list[int]:
    """Return the shape of a row's tensor in a file."""
    if source.transpose:
        return list(row.shape[::-1])
    if source.flattened:
        return [math.prod(row.shape)]
    return [source.part(row.shape[0])[1], *row.shape[1:]]


def _missing(
    role: str, table: Iterable[TensorRow], infos: Mapping[str, TensorInfo], first: str = ""
) -> tuple[str, ...]:
    """Return the tensors that a file lacks, under the names that the file would use.

    The naming convention and the prefix are those of the tensors that the file has.
    ``first``: a name of the tensor whose absence stopped the inference. The others come from the standard settings, and
    may be wrong for a model of another size.
    """
    found: Counter[tuple[int, str]] = Counter()
    absent: list[TensorRow] = []
    for row in table:
        index = next((i for i, source in enumerate(row.sources) if source.name in infos), None)
        if index is None:
            absent.append(row)
        else:
            info = infos[row.sources[index].name]
            # A name that all conventions share says nothing of the convention, only of the prefix.
            evidence = 1000 if len(row.sources) > 1 else 1
            found[index, info.name.removesuffix(row.sources[index].name)] += evidence
    absent.sort(key=lambda row: all(source.name != first for source in row.sources))
    if not found:
        return tuple(f"{role}.{row.name}" for row in absent)
    (index, prefix), _ = found.most_common(1)[0]
    names = (prefix + row.sources[min(index, len(row.sources) - 1)].name for row in absent)
    return tuple(dict.fromkeys(labelled(name, f"{role}.{row.name}") for name, row in zip(names, absent, strict=True)))


def _block_problem(row: TensorRow, source: TensorSource, info: TensorInfo) -> str | None:
    """Return why the blocks of a tensor cannot be read as a row's tensor; None if they can."""
    elements = _block_elements(info)
    if elements == 1:
        return None
    if source.transpose:
        return "the module needs it transposed; blocks cannot be"
    first, total = source.part(row.shape[0]) if source.chunk is not None or source.rows is not None else (0, 1)
    if math.prod(row.shape) % elements or first * info.elements // total % elements:
        return f"the part that {row.name} needs does not begin and end with a block of {elements} numbers"
    if source.swap_halves and math.prod(row.shape) // 2 % elements:
        return f"half of it does not end with a block of {elements} numbers"
    return None


def _block_elements(info: TensorInfo) -> int:
    """Return how many numbers of a tensor belong together."""
    if info.dtype in BLOCKS:
        return BLOCKS[info.dtype].elements
    return 1 if info.packing is None else info.packing.elements


def _location(row: TensorRow, source: TensorSource, info: TensorInfo) -> TensorLocation:
    """Return where the bytes of a row's tensor are. Its shape fits."""
    offset, nbytes, packing = info.offset, info.nbytes, info.packing
    if source.chunk is not None or source.rows is not None:
        first, total = source.part(row.shape[0])
        offset += first * nbytes // total
        if packing is not None:
            packing = replace(packing, first=first * info.elements // total // packing.elements)
        nbytes = row.shape[0] * nbytes // total
    return TensorLocation(
        row.name,
        info.dtype,
        row.shape,
        info.path,
        offset,
        nbytes,
        source.transpose,
        info.name,
        source.swap_halves,
        packing,
    )
