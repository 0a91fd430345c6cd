"""Completes a model whose file lacks components, with components of other files: text encoders and VAEs.

The components are found by what they are, not by names of files: any file of the library, or any model, that has a
component of the right kind and size can give it. The model's record stores which one was taken, by digest.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from safelight.catalog import paths
from safelight.catalog.adapters import Adapters
from safelight.catalog.identify import read_header
from safelight.catalog.model import Adapter, Model
from safelight.catalog.model_records import ModelRecords
from safelight.catalog.unread import UnreadFiles
from safelight.errors import FileError, InputError, ModelNotFoundError, UnsupportedModelError
from safelight.families.components import Component, Config
from safelight.families.family import Family
from safelight.request.adapters import Purpose
from safelight.weights import adapter_file
from safelight.weights.adapter_file import COMPONENT_KINDS
from safelight.weights.layout import CheckpointLayout
from safelight.weights.manifest import ComponentManifest, FileStamp, Manifest, whole_digest


@dataclass(frozen=True, slots=True)
class Part:
    """A component that a file can give to a model. ``source``: the name of the adapter or model that has it."""

    source: str
    component: ComponentManifest
    files: tuple[FileStamp, ...]


@dataclass(frozen=True, slots=True)
class Composition:
    """A complete model.

    ``sources``: for each component from another file, the name of the adapter or model that has it.
    """

    manifest: Manifest
    sources: Mapping[str, str] = field(default_factory=dict[str, str])


NamedParts = Sequence[tuple[Purpose, str]]
"""The adapters and models that the user chose to give components: (text encoder or VAE, name or path)."""


class PartFinder:
    """Finds components in the library under ``root``."""

    def __init__(self, root: Path) -> None:
        self._adapters = Adapters(root)
        self._models = ModelRecords(root)
        self._unread = UnreadFiles(root)

    def fitting(self, family: Family, role: str, configs: Mapping[str, Config]) -> list[Part]:
        """Return the parts that fit a model, with distinct contents: files of their own first, each sorted by name.

        ``configs``: of the model's other components, by role.
        """
        found: dict[str, Part] = {}
        component = family.component(role)
        for part in self._all(component):
            if family.find_mismatch({**configs, role: part.component.config}) is None:
                found.setdefault(part.component.digest, part)
        if not found and (part := self._read_imported(family, component, configs)) is not None:
            return [part]
        return list(found.values())

    def _read_imported(self, family: Family, component: Component, configs: Mapping[str, Config]) -> Part | None:
        """Read the first file that was imported and has a component that fits; None if there is none."""
        for card in self._adapters.cards():
            if card.digest or card.kind not in COMPONENT_KINDS or card.state() != "there":
                continue
            with contextlib.suppress(InputError):
                layouts = adapter_file.layout(read_header(card.path), card.kind)
                own = next((one for one in layouts if _suits(component, one.config)), None)
                if own is None or family.find_mismatch({**configs, component.role: own.config}) is not None:
                    continue
                return _part_of_adapter(self._adapters.get(card.name), component)
        return None

    def sources(self, model: Model, role: str) -> list[str]:
        """Return the names of the adapters and models that could give a model's component, with distinct contents."""
        configs = {part.role: part.config for part in model.manifest.components if part.role != role}
        return [part.source for part in self.fitting(model.family, role, configs)]

    def with_digest(self, component: Component, digest: str) -> Part | None:
        """Return the part with this content, None if there is none."""
        return next((part for part in self._all(component) if part.component.digest == digest), None)

    def named(self, family: Family, purpose: Purpose, reference: str) -> dict[str, Part]:
        """Return the parts that an adapter or model gives for a purpose, by role.

        ``reference``: the name of an adapter or model, or the path of a file.
        Raises ModelNotFoundError, and UnsupportedModelError for a file that has no such component.
        """
        roles = {component.role for component in family.of(purpose)}
        components = [one for one in family.components if one.role in roles or one.within in roles]
        try:
            adapter = self._adapters.find(reference)
        except (ModelNotFoundError, UnsupportedModelError):
            model = self._models.get(reference)
            if model is None and (unread := self._unread.find(reference, models=True)) is not None:
                todo = f"`safelight models add {shlex.quote(unread.path)}`"
                raise InputError(f"{reference} was imported, and has not been read yet; read it with {todo}") from None
            if model is None:
                raise ModelNotFoundError(reference, self._similar(reference), str(purpose)) from None
            parts = {component.role: _part_of_model(model, component) for component in components}
            path, what = model.path, f"is a {model.base} model"
        else:
            adapter = self._adapters.ensure_unchanged(adapter)
            parts = {component.role: _part_of_adapter(adapter, component) for component in components}
            path, what = adapter.path, f"is a {adapter.kind} ({adapter.component.config.architecture})"
        found = {role: part for role, part in parts.items() if part is not None}
        if found.keys().isdisjoint(roles):
            raise UnsupportedModelError(path, f"{what}, which has no {purpose} for {family.name}")
        return found

    def _similar(self, reference: str) -> list[str]:
        names = [card.name for card in self._adapters.cards() if card.kind in COMPONENT_KINDS]
        return paths.similar_names(reference, [*names, *(card.name for card in self._models.cards())])

    def _all(self, component: Component) -> Iterator[Part]:
        for card in self._adapters.cards():
            if card.digest and card.kind in COMPONENT_KINDS and card.state() == "there":
                try:
                    adapter = self._adapters.get(card.name)
                except FileError:
                    continue
                if (part := _part_of_adapter(adapter, component)) is not None:
                    yield part
        for card in self._models.cards():
            if card.problem or card.state() != "there":
                continue
            try:
                part = _part_of_model(self._models.read(card), component)
            except FileError:
                continue
            if part is not None:
                yield part


def complete(
    layout: CheckpointLayout, own: Manifest, finder: PartFinder, wanted: Mapping[str, str], named: NamedParts
) -> Composition:
    """Return a model with the components that its file lacks, and with others in place of its own.

    ``own``: the manifest of the file.
    ``wanted``: digests of components that were taken before, by role.
    ``named``: the adapters or models that the user chose.

    Raises UnsupportedModelError if a component is nowhere, and lists what is missing.
    """
    family = layout.family
    components = family.components_of(layout.variant or "")
    taken: dict[str, Part] = {}
    # What reads a text encoder's output belongs to the denoiser, which was trained with it. So the file's own stays.
    own_readers = {one.role for one in components if one.reads} & {component.role for component in own.components}
    for purpose, reference in named:
        given = finder.named(family, purpose, reference)
        fitting_roles = [component.role for component in components if component.role not in own_readers]
        taken |= {role: given[role] for role in fitting_roles if role in given}
    elsewhere = taken.keys() | wanted.keys()
    parts = {component.role: component for component in own.components if component.role not in elsewhere}
    _refuse_mismatch(layout, parts, taken)
    missing: list[str] = []
    # Those within others come after these, so that one file gives both.
    for component in sorted(components, key=lambda one: bool(one.within)):
        role = component.role
        if role in parts or role in taken:
            continue
        configs = {one: part.config for one, part in parts.items()} | {r: p.component.config for r, p in taken.items()}
        if role in wanted and (found := finder.with_digest(component, wanted[role])) is not None:
            taken[role] = found
        elif fitting := finder.fitting(family, role, configs):
            home = taken[component.within].source if component.within in taken else ""
            taken[role] = next((part for part in fitting if part.source == home), fitting[0])
        else:
            where = f"; {component.found_in} has it" if component.found_in else ""
            missing.append(f"{role} ({describe(component)}{where})")
    if missing:
        todo = (
            "add it with `safelight adapters add FILE`" if len(missing) == 1 else "add them: `safelight adapters add`"
        )
        raise UnsupportedModelError(
            layout.path, f"has no {' and no '.join(missing)}, and none in the library fits; {todo}"
        )
    return Composition(_joined(layout, own, parts, taken), {r: p.source for r, p in taken.items()})


def describe(component: Component) -> str:
    """Say in a few words what a component is, such as ``qwen3 2560x35``."""
    standard = component.standard
    return "" if standard is None else f"{standard.architecture} {standard.label}"


def _joined(
    layout: CheckpointLayout, own: Manifest, parts: Mapping[str, ComponentManifest], taken: Mapping[str, Part]
) -> Manifest:
    roles = layout.family.roles_of(layout.variant or "")
    components = tuple(parts.get(role) or taken[role].component for role in roles)
    _refuse_mismatch(layout, parts, taken)
    files = dict.fromkeys([*own.files, *(stamp for part in taken.values() for stamp in part.files)])
    return Manifest(components, tuple(files), whole_digest(components))


def _refuse_mismatch(
    layout: CheckpointLayout, parts: Mapping[str, ComponentManifest], taken: Mapping[str, Part]
) -> None:
    """Raise UnsupportedModelError if the components that are known so far do not fit together."""
    components = [*parts.values(), *(part.component for part in taken.values())]
    problem = layout.family.find_mismatch({component.role: component.config for component in components})
    if problem is not None:
        sources = ", ".join(f"{role} of {part.source}" for role, part in taken.items())
        raise UnsupportedModelError(layout.path, f"does not fit the {sources}: {problem}")


def _suits(component: Component, config: Config) -> bool:
    return component.standard is not None and type(config) is type(component.standard)


def _part_of_adapter(adapter: Adapter, component: Component) -> Part | None:
    found = next((one for one in adapter.manifest.components if _suits(component, one.config)), None)
    return None if found is None else Part(adapter.name, replace(found, role=component.role), adapter.manifest.files)


def _part_of_model(model: Model, component: Component) -> Part | None:
    found = next((one for one in model.manifest.components if _suits(component, one.config)), None)
    if found is None:
        return None
    paths_of = {tensor.path for tensor in found.tensors}
    if found.tokenizer is not None:
        paths_of.add(found.tokenizer.path)
    files = tuple(stamp for stamp in model.manifest.files if stamp.path in paths_of)
    return Part(model.name, replace(found, role=component.role), files)
