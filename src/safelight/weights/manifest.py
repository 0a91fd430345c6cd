"""A checkpoint's manifest: each tensor's name, dtype, shape, location and checksum, and the digest of the whole.

A component's digest is a hash of its tensors' names, dtypes, shapes and bytes. So the same weights have the same digest
in any file and any order. Manifests are stored as JSON; :func:`from_json` computes the checkpoint's digest again and
compares it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safelight.errors import CorruptFileError, IntegrityError
from safelight.families.components import Config
from safelight.families.registry import architectures
from safelight.families.tokenizer_file import TokenizerContent
from safelight.files.disk import open_regular, read_file
from safelight.files.header import Beside, Packing
from safelight.weights.adapter_mapping import AdapterConfig
from safelight.weights.digest import TensorDigester, hash_bytes, hash_texts
from safelight.weights.layout import FLOATS, ComponentLayout, TensorLocation

VERSION = 2
"""Version 2 has packings."""


@dataclass(frozen=True, slots=True)
class FileStamp:
    """A file's size in bytes, its times in nanoseconds and its inode.

    They are only a hint: a changed file may have equal values, and an unchanged file may have different ones.
    """

    path: Path
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    def is_unchanged(self) -> bool:
        """Whether the file has the same size, times and inode as before."""
        try:
            return FileStamp.of(self.path) == self
        except OSError:
            return False

    @classmethod
    def of(cls, path: Path) -> FileStamp:
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@dataclass(frozen=True, slots=True)
class ManifestTensor:
    """A tensor's location in a file, and its hash.

    ``dtype``: the form in the file, by safetensors' or ggml's name.
    ``shape``: the module's shape.
    ``offset``, ``nbytes``: the range of bytes in ``path``.
    ``transpose``: the file stores the transposed matrix.
    ``xxh3``: the XXH3-128 of those bytes, in hex.
    ``swap_halves``: the file stores the second half of the rows before the first.
    ``packing``: see :class:`safelight.files.header.Packing`; None if the dtype says all.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    transpose: bool
    xxh3: str
    swap_halves: bool = False
    packing: Packing | None = None

    @property
    def is_compact(self) -> bool:
        """Whether the file stores the tensor quantised."""
        return self.dtype not in FLOATS or self.packing is not None

    @property
    def beside(self) -> tuple[Beside, ...]:
        """The tensors with its scales."""
        return () if self.packing is None else self.packing.beside

    @property
    def stored_nbytes(self) -> int:
        """Bytes of the tensor and those beside it."""
        return self.nbytes + sum(one.nbytes for one in self.beside)


@dataclass(frozen=True, slots=True)
class ManifestTokenizer:
    """A tokenizer file. ``digest``: BLAKE3 in hex of its bytes."""

    path: Path
    digest: str

    def read(self) -> TokenizerContent:
        """Read the file. Raises IntegrityError if its content changed, UnreadableFileError if it cannot be read."""
        data = read_file(self.path)
        if hash_bytes(data) != self.digest:
            raise IntegrityError(self.path, "", "its content changed", "Put the right file back, or add it again.")
        return TokenizerContent(self.digest, data)


@dataclass(frozen=True, slots=True)
class ComponentManifest:
    """A component.

    ``tensors``: in the order in which a forward pass uses them.
    ``digest``: BLAKE3 in hex, of the tensors and the tokenizer.
    ``tokenizer``: of a text encoder whose tokenizer is not the shipped one; None for other components.
    ``compact``: whether its quantised tensors stay quantised in memory. Then each operation dequantises what it uses.
    ``widened``: names of quantised tensors that are dequantised in memory nevertheless, because there is room.
    """

    role: str
    config: Config
    tensors: tuple[ManifestTensor, ...]
    digest: str
    tokenizer: ManifestTokenizer | None = field(default=None, kw_only=True)
    compact: bool = field(default=False, kw_only=True)
    widened: frozenset[str] = field(default=frozenset(), kw_only=True)

    def __hash__(self) -> int:
        """Hash the digest, not the tensors: hashing thousands of tensors would take milliseconds."""
        return hash((self.role, self.digest))

    def stays_compact(self, tensor: ManifestTensor) -> bool:
        """Return whether a tensor of the component is in memory as its file stores it."""
        return self.can_stay_compact(tensor) and tensor.name not in self.widened

    def can_stay_compact(self, tensor: ManifestTensor) -> bool:
        """Return whether a tensor of the component is in memory as its file stores it if there is no room for more.

        Vectors never are.
        """
        in_order = not tensor.transpose and not tensor.swap_halves
        return self.compact and tensor.is_compact and in_order and len(tensor.shape) > 1

    @property
    def elements(self) -> int:
        """The number of elements of all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A checkpoint. ``digest``: BLAKE3 in hex of its components' digests."""

    components: tuple[ComponentManifest, ...]
    files: tuple[FileStamp, ...]
    digest: str

    def component(self, role: str) -> ComponentManifest:
        return next(component for component in self.components if component.role == role)

    def changed_files(self) -> list[Path]:
        """Return the files that are missing, or whose size, times or inode changed. Empty if none did."""
        return [stamp.path for stamp in self.files if not stamp.is_unchanged()]


def relocate(manifest: Manifest, path: Path) -> Manifest:
    """Return the manifest of a single file after that file was renamed to ``path``."""
    components = tuple(replace(c, tensors=tuple(_moved(t, path) for t in c.tensors)) for c in manifest.components)
    tokenizers = {component.tokenizer.path for component in components if component.tokenizer is not None}
    beside = (stamp for stamp in manifest.files if stamp.path in tokenizers)
    return Manifest(components, (FileStamp.of(path), *beside), manifest.digest)


def _moved(tensor: ManifestTensor, path: Path) -> ManifestTensor:
    packing = tensor.packing
    if packing is not None:
        packing = replace(packing, beside=tuple(replace(one, path=path) for one in packing.beside))
    return replace(tensor, path=path, packing=packing)


def hash_components(
    components: tuple[ComponentLayout, ...],
    progress: Callable[[int], None] | None = None,
    watched: tuple[Path, ...] = (),
) -> Manifest:
    """Read every tensor once and build the manifest.

    ``progress``: called after each chunk with the number of its bytes.
    ``watched``: more files and folders to record, whose changes mean that the checkpoint may have changed.

    Raises CorruptFileError if a file is cut off, holds NaN or infinity, or changes while it is read.
    Raises UnsupportedModelError if a tokenizer is not there or cannot be used.
    """
    tensors = [tensor for component in components for tensor in component.tensors]
    beside = (one.path for tensor in tensors if tensor.packing is not None for one in tensor.packing.beside)
    paths = sorted({*(tensor.path for tensor in tensors), *beside})
    tokenizers = dict.fromkeys(path for one in components if (path := one.tokenizer_path()) is not None)
    before = tuple(FileStamp.of(path) for path in (*paths, *tokenizers, *watched))
    opened: dict[Path, int] = {}
    try:
        for path in paths:
            opened[path] = open_regular(path)[0]
        hashed = tuple(_hash_component(component, opened, progress) for component in components)
    finally:
        for descriptor in opened.values():
            os.close(descriptor)
    changed = next((stamp.path for stamp in before if not stamp.is_unchanged()), None)
    if changed is not None:
        raise CorruptFileError(changed, "changed while it was read; try again when its download has ended")
    return Manifest(hashed, before, whole_digest(hashed))


def whole_digest(components: tuple[ComponentManifest, ...]) -> str:
    """Compute a checkpoint's digest from its components' digests."""
    return hash_texts(*(f"{component.role}={component.digest}" for component in components))


def _hash_component(
    component: ComponentLayout, opened: Mapping[Path, int], progress: Callable[[int], None] | None
) -> ComponentManifest:
    digester = TensorDigester(progress)
    if isinstance(component.config, AdapterConfig) and component.config.scales:
        # These settings from the file's metadata change what the tensors mean.
        digester.blake3.update(repr((component.config.scaled, component.config.scales)).encode())
    tokenizer = None
    if (path := component.tokenizer_path()) is not None:
        tokenizer = ManifestTokenizer(path, hash_bytes(read_file(path)))
        digester.blake3.update(f"tokenizer {tokenizer.digest}".encode())
    packings = [_hash_packing(location, opened, digester) for location in component.tensors]
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
            p.swap_halves,
            packing,
        )
        for p, packing in zip(component.tensors, packings, strict=True)
    ]
    digest = digester.blake3.hexdigest()
    return ComponentManifest(component.role, component.config, tuple(tensors), digest, tokenizer=tokenizer)


def _hash_packing(place: TensorLocation, opened: Mapping[Path, int], digester: TensorDigester) -> Packing | None:
    """Return a tensor's packing with the hashes of the tensors beside it, and digest it."""
    packing = place.packing
    if packing is None:
        return None
    if packing.scale is not None:
        digester.blake3.update(f"scale {place.name} {packing.scale!r}".encode())
    if not packing.beside and not packing.group:
        return packing
    settings = (packing.elements, packing.group, packing.nested, packing.offset, packing.first, place.swap_halves)
    digester.blake3.update(f"packing {place.name} {settings!r}".encode())
    beside = tuple(replace(one, xxh3=digester.beside(opened[one.path], one)) for one in packing.beside)
    return replace(packing, beside=beside)


def to_json(manifest: Manifest) -> dict[str, Any]:
    """Convert a manifest to JSON values. Paths become strings, and tensors refer to files by index."""
    number = {stamp.path: i for i, stamp in enumerate(manifest.files)}
    return {
        "version": VERSION,
        "digest": manifest.digest,
        "files": [asdict(stamp) | {"path": str(stamp.path)} for stamp in manifest.files],
        "components": [
            {
                "role": c.role,
                "digest": c.digest,
                "architecture": c.config.architecture,
                "config": asdict(c.config),
                "tensors": [_tensor_to_json(t, number) for t in c.tensors],
                **({} if c.tokenizer is None else {"tokenizer": [number[c.tokenizer.path], c.tokenizer.digest]}),
            }
            for c in manifest.components
        ],
    }


def _tensor_to_json(tensor: ManifestTensor, file: Mapping[Path, int]) -> list[Any]:
    """Convert a tensor to a list. The items for swapped halves and a packing are left out where there are none.

    ``file``: the index of each file.
    """
    t = tensor
    values = [t.name, t.dtype, list(t.shape), file[t.path], t.offset, t.nbytes, t.transpose, t.xxh3]
    if t.packing is None:
        return [*values, True] if t.swap_halves else values
    beside = [[b.kind, b.name, b.dtype, file[b.path], b.offset, b.nbytes, b.xxh3] for b in t.packing.beside]
    return [*values, t.swap_halves, {**asdict(t.packing), "beside": beside}]


def from_json(source: Path, data: Any, folder: Path | None = None) -> Manifest:
    """Read a manifest that :func:`to_json` wrote.

    ``source``: the file to name in errors.
    ``folder``: the folder of relative paths.

    Raises CorruptFileError if ``data`` is not a manifest, has a newer version, or its digest does not match its
    components.
    """
    try:
        if data["version"] > VERSION:
            raise CorruptFileError(source, f"was written by a newer Safelight (manifest version {data['version']})")
        root = folder or Path()
        files = tuple(_read_stamp(root, stamp) for stamp in data["files"])
        components = tuple(_component_from_json(c, files) for c in data["components"])
        manifest = Manifest(components, files, data["digest"])
    except OSError as error:
        raise CorruptFileError(source, f"names a file that cannot be opened ({error})") from error
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CorruptFileError(source, f"is not a manifest ({type(error).__name__}: {error})") from error
    if whole_digest(components) != manifest.digest:
        raise CorruptFileError(source, "is damaged: its digest does not match its components")
    return manifest


def _read_stamp(root: Path, data: Any) -> FileStamp:
    """Read a stamp. If it has only a path, as in starters' records, use the file's current size, times and inode."""
    path = root / data["path"]
    return FileStamp(**{**data, "path": path}) if "size" in data else FileStamp.of(path)


def _packing_from_json(data: Any, files: tuple[FileStamp, ...]) -> Packing:
    """Read a packing. Version 1 of a manifest has only a scale."""
    if isinstance(data, float):
        return Packing(scale=data)
    beside = tuple(
        Beside(kind, name, dtype, files[at].path, offset, nbytes, xxh3)
        for kind, name, dtype, at, offset, nbytes, xxh3 in data["beside"]
    )
    settings: dict[str, Any] = {**data, "beside": beside}
    return Packing(**settings)


def _component_from_json(data: Any, files: tuple[FileStamp, ...]) -> ComponentManifest:
    tensors = tuple(
        ManifestTensor(
            name,
            dtype,
            tuple(shape),
            files[at].path,
            offset,
            nbytes,
            transpose,
            xxh3,
            *others[:1],
            packing=_packing_from_json(others[1], files) if len(others) > 1 else None,
        )
        for name, dtype, shape, at, offset, nbytes, transpose, xxh3, *others in data["tensors"]
    )
    kind = data["architecture"]
    config = AdapterConfig if kind == AdapterConfig.architecture else architectures().get(kind)
    if config is None:
        raise KeyError(f"no installed family has the architecture {kind}")
    tokenizer = None
    if "tokenizer" in data:
        at, digest = data["tokenizer"]
        tokenizer = ManifestTokenizer(files[at].path, digest)
    settings = config.from_json(data["config"])
    return ComponentManifest(data["role"], settings, tensors, data["digest"], tokenizer=tokenizer)
