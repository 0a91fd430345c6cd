"""A checkpoint's manifest: each tensor's name, dtype, shape, place and digest, and the digest of the whole.

A component's digest is made of its tensors' names, dtypes, shapes and bytes, so that the same weights have the same
digest in whatever file and order they lie. Manifests are JSON; :func:`from_json` re-derives what can be re-derived.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safelight.errors import CorruptFileError
from safelight.files import open_regular
from safelight.formats.header import ITEM_BYTES
from safelight.formats.keys.adapters import AdapterConfig
from safelight.formats.keys.clip import CLIPConfig
from safelight.formats.keys.controlnet import ControlNetConfig
from safelight.formats.keys.unet import UNetConfig
from safelight.formats.keys.vae import VAEConfig
from safelight.formats.layout import ComponentConfig, ComponentLayout
from safelight.weights.digest import TensorDigester, named

VERSION = 1


@dataclass(frozen=True, slots=True)
class FileHint:
    """A file's size, times and inode: they only hint that it changed, in either direction. Times in nanoseconds."""

    path: Path
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    def holds(self) -> bool:
        """Whether the file is as it was, as far as its size, times and inode tell."""
        try:
            return FileHint.of(self.path) == self
        except OSError:
            return False

    @classmethod
    def of(cls, path: Path) -> FileHint:
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@dataclass(frozen=True, slots=True)
class ManifestTensor:
    """``offset`` and ``nbytes`` are bytes of ``path``; ``xxh3`` is the hash of just those bytes, in hex.

    ``shape`` is the module's; with ``transpose`` the bytes hold the matrix the other way round.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    transpose: bool
    xxh3: str


@dataclass(frozen=True, slots=True)
class ComponentManifest:
    """``digest``: BLAKE3 in hex. ``tensors`` are in the order in which a forward pass uses them."""

    role: str
    config: ComponentConfig
    tensors: tuple[ManifestTensor, ...]
    digest: str

    def __hash__(self) -> int:
        """By the digest, which stands for the tensors: hashing thousands of them would take milliseconds."""
        return hash((self.role, self.digest))

    @property
    def elements(self) -> int:
        """How many numbers the component holds."""
        return sum(tensor.nbytes // ITEM_BYTES[tensor.dtype] for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Manifest:
    """``digest`` is the whole checkpoint's: BLAKE3 in hex over its components' digests."""

    components: tuple[ComponentManifest, ...]
    files: tuple[FileHint, ...]
    digest: str

    def component(self, role: str) -> ComponentManifest:
        return next(component for component in self.components if component.role == role)

    def changed(self) -> list[Path]:
        """The files whose hints differ from what they were, or that are gone; none when all are as they were."""
        return [hint.path for hint in self.files if not hint.holds()]


def moved(manifest: Manifest, place: Path) -> Manifest:
    """The manifest of one file after that file was renamed to ``place``."""
    components = tuple(
        replace(c, tensors=tuple(replace(t, path=place) for t in c.tensors)) for c in manifest.components
    )
    return Manifest(components, (FileHint.of(place),), manifest.digest)


def measure(
    components: tuple[ComponentLayout, ...],
    progress: Callable[[int], None] | None = None,
    watched: tuple[Path, ...] = (),
) -> Manifest:
    """Read every tensor once and make the manifest. ``progress`` is told of bytes read.

    ``watched``: further files and folders whose change means that something changed.

    Raises CorruptFileError when a file is cut off, holds NaN or infinity, or changes meanwhile.
    """
    paths = sorted({place.path for component in components for place in component.tensors})
    before = tuple(FileHint.of(path) for path in (*paths, *watched))
    opened: dict[Path, int] = {}
    try:
        for path in paths:
            opened[path] = open_regular(path)[0]
        measured = tuple(_measure_component(component, opened, progress) for component in components)
    finally:
        for descriptor in opened.values():
            os.close(descriptor)
    changed = next((hint.path for hint in before if not hint.holds()), None)
    if changed is not None:
        raise CorruptFileError(changed, "changed while it was read; try again when its download has ended")
    return Manifest(measured, before, whole_digest(measured))


def whole_digest(components: tuple[ComponentManifest, ...]) -> str:
    """The digest of a checkpoint, from its components' digests."""
    return named(*(f"{component.role}={component.digest}" for component in components))


def _measure_component(
    component: ComponentLayout, opened: Mapping[Path, int], progress: Callable[[int], None] | None
) -> ComponentManifest:
    digester = TensorDigester(progress)
    if isinstance(component.config, AdapterConfig) and component.config.scales:
        # What the metadata says changes what the tensors mean.
        digester.blake3.update(repr((component.config.scaled, component.config.scales)).encode())
    tensors = [
        ManifestTensor(
            p.name,
            p.dtype,
            p.shape,
            p.path,
            p.offset,
            p.nbytes,
            p.transpose,
            digester.tensor(opened[p.path], p),
        )
        for p in component.tensors
    ]
    return ComponentManifest(component.role, component.config, tuple(tensors), digester.blake3.hexdigest())


_CONFIGS = {
    "clip": CLIPConfig,
    "unet": UNetConfig,
    "vae": VAEConfig,
    "controlnet": ControlNetConfig,
    "adapter": AdapterConfig,
}


def to_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest as JSON values; paths become texts, files are numbered."""
    number = {hint.path: i for i, hint in enumerate(manifest.files)}
    kinds = {kind: name for name, kind in _CONFIGS.items()}
    return {
        "version": VERSION,
        "digest": manifest.digest,
        "files": [asdict(hint) | {"path": str(hint.path)} for hint in manifest.files],
        "components": [
            {
                "role": c.role,
                "digest": c.digest,
                "architecture": kinds[type(c.config)],
                "config": asdict(c.config),
                "tensors": [
                    [t.name, t.dtype, list(t.shape), number[t.path], t.offset, t.nbytes, t.transpose, t.xxh3]
                    for t in c.tensors
                ],
            }
            for c in manifest.components
        ],
    }


def from_json(source: Path, data: Any, folder: Path | None = None) -> Manifest:
    """The manifest that :func:`to_json` wrote; relative paths are taken from ``folder``.

    Raises CorruptFileError, naming ``source``, when it is not one, is of a newer version, or its digest does not follow
    from its components.
    """
    try:
        if data["version"] > VERSION:
            raise CorruptFileError(source, f"was written by a newer Safelight (manifest version {data['version']})")
        root = folder or Path()
        files = tuple(_hint(root, hint) for hint in data["files"])
        components = tuple(_component_from_json(c, files) for c in data["components"])
        manifest = Manifest(components, files, data["digest"])
    except (KeyError, TypeError, ValueError, IndexError, OSError) as error:
        raise CorruptFileError(source, f"is not a manifest ({type(error).__name__}: {error})") from error
    if whole_digest(components) != manifest.digest:
        raise CorruptFileError(source, "is damaged: its digest does not follow from its components")
    return manifest


def _hint(root: Path, data: Any) -> FileHint:
    """A hint as it was written; one that has only a path (a packed file's) is taken as the file is now."""
    path = root / data["path"]
    return FileHint(**{**data, "path": path}) if "size" in data else FileHint.of(path)


def _component_from_json(data: Any, files: tuple[FileHint, ...]) -> ComponentManifest:
    settings = _frozen(data["config"])
    if "encoder" in settings:
        settings["encoder"] = UNetConfig(**_frozen(settings["encoder"]))
    tensors = tuple(
        ManifestTensor(name, dtype, tuple(shape), files[at].path, offset, nbytes, transpose, xxh3)
        for name, dtype, shape, at, offset, nbytes, transpose, xxh3 in data["tensors"]
    )
    return ComponentManifest(data["role"], _CONFIGS[data["architecture"]](**settings), tensors, data["digest"])


def _frozen(values: Any) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
