"""The layout of a checkpoint: for every tensor that its modules need, the file and the offset of its bytes.

The shapes decide the settings of each component; the family decides everything that does not follow from shapes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safelight.errors import IncompleteModelError, UnsupportedModelError
from safelight.families.family import Component, Config, Family, SingleFileComponent, TokenizerFile
from safelight.families.tables import NotThisArchitecture, TensorRow, TensorSource, squeezed
from safelight.files.header import Header, TensorInfo
from safelight.request.adapters import Purpose

FLOATS = frozenset({"F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """A tensor under its module's name, and where its bytes are.

    ``shape``: the shape in the module.
    ``offset``, ``nbytes``: bytes in ``path``.
    ``transpose``: the file stores the matrix transposed.
    ``source``: the tensor's name in the file.
    ``swap_halves``: the file stores the second half of the rows before the first.

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

    ``role``: its folder name in diffusers.
    ``tensors``: in the order in which a forward pass uses them.
    ``tokenizer``: the tokenizer that must be beside the weights; None if there is none.
    ``home``: the folder or file of the checkpoint.
    """

    role: str
    config: Config
    tensors: tuple[TensorLocation, ...]
    tokenizer: TokenizerFile | None = None
    home: Path = Path()

    def tokenizer_path(self) -> Path | None:
        """Return the path of the tokenizer file. Raises UnsupportedModelError if it is not there."""
        if self.tokenizer is None:
            return None
        places = self.tokenizer.candidates(self.home)
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            missing, source = " or ".join(map(str, places)), self.tokenizer.source
            raise UnsupportedModelError(self.home, f"has no tokenizer: put {missing} there, which comes from {source}")
        return found

    @property
    def nbytes(self) -> int:
        return sum(location.nbytes for location in self.tensors)


@dataclass(frozen=True, slots=True)
class CheckpointLayout:
    """The layout of a checkpoint. ``left_over``: tensors that no module needs, with the reason why each is allowed."""

    path: Path
    family: Family
    components: tuple[ComponentLayout, ...]
    left_over: Mapping[str, str]

    def component(self, role: str) -> ComponentLayout:
        return next(component for component in self.components if component.role == role)

    @property
    def missing(self) -> tuple[str, ...]:
        """The roles of components that other files must give."""
        own = {component.role for component in self.components}
        return tuple(role for role in self.family.roles if role not in own)


def split(header: Header, family: Family) -> dict[str, dict[str, TensorInfo]]:
    """Return the tensors of each component of a single file, without their prefixes.

    With ``separate_parts``, only the denoiser must be there.
    Raises IncompleteModelError when a component has no tensors.
    """
    parts: dict[str, dict[str, TensorInfo]] = {}
    for component in family.components:
        for prefix in component.prefixes:
            found = {name[len(prefix) :]: info for name, info in header.tensors.items() if name.startswith(prefix)}
            if found and component.role not in parts:
                parts[component.role] = found
        optional = family.separate_parts and component.role != family.denoiser
        if component.role not in parts and not optional:
            wanted = component.prefixes[0] + "*"
            what = f"{family.name} checkpoint (no {component.role})"
            raise IncompleteModelError(header.path, what, missing=(wanted,))
    return parts


def build(
    path: Path, family: Family, parts: Mapping[str, Mapping[str, TensorInfo]], names: Iterable[str]
) -> CheckpointLayout:
    """Return the layout of a checkpoint.

    ``parts``: the tensors of each component, by role.
    ``names``: the names of all tensors in its files.
    Raises IncompleteModelError when tensors are missing, have a wrong shape, or are unknown. The error lists them.
    Raises UnsupportedModelError when the components are complete but do not fit together.
    """
    what = f"{family.name} checkpoint"
    built = [
        _built(path, what, component, parts[component.role])
        for component in family.components
        if component.role in parts
    ]
    components = [part.component for part in built]
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
    return CheckpointLayout(path, family, tuple(components), {name: why or "" for name, why in left_over.items()})


def single_component_layout(
    path: Path, part: SingleFileComponent, family: Family, infos: Mapping[str, TensorInfo]
) -> ComponentLayout:
    """Return the layout of a component in a file of its own, such as a VAE or a ControlNet.

    Raises IncompleteModelError as :func:`build` does.
    """
    component = next((one for one in family.components if one.role == part.kind), None)
    standard = None if component is None else component.standard
    # ``_built`` does not read the purpose, so the same one serves for ControlNets and VAEs.
    tokenizer = None if component is None else component.tokenizer
    whole = Component(part.kind, Purpose.CONTROL, (), part.infer, standard, tokenizer=tokenizer)
    one = _built(path, part.what, whole, infos)
    used = {name for _, name in one.used}
    reason = part.left_over or family.left_over
    unexpected = [info.name for info in infos.values() if info.name not in used and reason(info.name) is None]
    if one.missing or one.mismatched or unexpected:
        raise IncompleteModelError(path, part.what, one.missing, one.mismatched, unexpected)
    return one.component


@dataclass(frozen=True, slots=True)
class _Built:
    component: ComponentLayout
    used: frozenset[tuple[Path, str]]
    missing: tuple[str, ...]
    mismatched: tuple[str, ...]


def _built(path: Path, what: str, part: Component, infos: Mapping[str, TensorInfo]) -> _Built:
    """Build one component and collect its faults. ``what``: the name of the file's kind in errors."""
    role = part.role
    used: set[tuple[Path, str]] = set()
    mismatched: list[str] = []
    try:
        config = part.infer({name: info.shape for name, info in infos.items()})
    except (NotThisArchitecture, KeyError) as error:
        missing = _missing(role, part.standard.rows(), infos) if part.standard is not None else ()
        # List first the tensor whose absence stopped the inference. The others come from the standard settings, and may
        # be wrong for a model of another size.
        cause = error if isinstance(error, KeyError) else error.__cause__
        lacked = cause.args[0] if isinstance(cause, KeyError) else ""
        missing = tuple(sorted(missing, key=lambda one: lacked not in one))
        raise IncompleteModelError(path, what, missing=missing or (f"{role}: {error}",)) from error
    locations: list[TensorLocation] = []
    table = list(config.rows())
    for row in table:
        source = next((source for source in row.sources if source.name in infos), None)
        if source is None:
            continue
        info = infos[source.name]
        used.add((info.path, info.name))
        location = _location(row, source, info)
        if location is None:
            sizes = f"{list(info.shape)} instead of {_in_file(row, source)}"
            mismatched.append(f"{labelled(info.name, f'{role}.{row.name}')}: {sizes}")
        elif location.dtype not in FLOATS:
            raise UnsupportedModelError(path, f"tensor {info.name} is {info.dtype}; only F32, F16 and BF16 are read")
        else:
            locations.append(location)
    missing = _missing(role, table, infos)
    component = ComponentLayout(role, config, tuple(locations), part.tokenizer, path if part.tokenizer else Path())
    return _Built(component, frozenset(used), missing, tuple(mismatched))


def _in_file(row: TensorRow, source: TensorSource) -> list[int]:
    """Return the shape of a row's tensor in a file."""
    if source.transpose:
        return list(row.shape[::-1])
    if source.flattened:
        return list(_flat(row.shape))
    return [source.part(row.shape[0])[1], *row.shape[1:]]


def _missing(role: str, table: Iterable[TensorRow], infos: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Return the tensors that a file lacks, under the names that the file would use.

    The naming convention and the prefix are those of the tensors that the file has.
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
    if not found:
        return tuple(f"{role}.{row.name}" for row in absent)
    (index, prefix), _ = found.most_common(1)[0]
    names = (prefix + row.sources[min(index, len(row.sources) - 1)].name for row in absent)
    return tuple(dict.fromkeys(labelled(name, f"{role}.{row.name}") for name, row in zip(names, absent, strict=True)))


def _flat(shape: tuple[int, ...]) -> tuple[int]:
    return (math.prod(shape),)


def _location(row: TensorRow, source: TensorSource, info: TensorInfo) -> TensorLocation | None:
    """Return where a row's bytes are, or None if the shape in the file does not fit."""
    shape, offset, nbytes = info.shape, info.offset, info.nbytes
    if source.chunk is not None or source.rows is not None:
        first, total = source.part(row.shape[0])
        if not shape or shape[0] != total:
            return None
        shape = (row.shape[0], *shape[1:])
        offset += first * nbytes // total
        nbytes = row.shape[0] * nbytes // total
    if source.transpose:
        if shape != row.shape[::-1]:
            return None
    elif squeezed(shape) != squeezed(row.shape) and not (source.flattened and squeezed(shape) == _flat(row.shape)):
        return None
    return TensorLocation(
        row.name, info.dtype, row.shape, info.path, offset, nbytes, source.transpose, info.name, source.swap_halves
    )
