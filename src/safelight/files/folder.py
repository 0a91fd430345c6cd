"""Reads the headers of a diffusers folder: its index, and one folder of weights per component."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safelight.errors import CorruptFileError, UnreadableFileError, UnsupportedModelError
from safelight.files import pickle, safetensors
from safelight.files.header import Header, TensorInfo
from safelight.files.packing import merge_metadata

INDICES = ("model_index.json", "modular_model_index.json")
"""The names of a folder's index. diffusers' modular pipelines have the second one."""

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_VARIANTS = ("", ".fp16", ".bf16", ".fp32")
_MOST_JSON_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Folder:
    """The headers of a diffusers folder.

    ``index``: what the folder's index says: the class of each component, and settings of the pipeline.
    ``components``: the headers of the weights in each component's folder, by the folder's name.
    ``scheduler``: the scheduler's settings; empty if there is no scheduler.
    ``watched``: the settings files, and the folders in which a new file could be preferred to the present one.
    """

    path: Path
    pipeline: str
    index: Mapping[str, Any]
    components: Mapping[str, Header]
    scheduler: Mapping[str, Any]
    watched: tuple[Path, ...]

    def settings_of(self, component: str) -> dict[str, Any]:
        """Read a component's settings, which may be absent: then empty. Raises CorruptFileError.

        ``component``: its folder.
        """
        file = self.path / component / "config.json"
        return read_json(file) if file.exists() else {}


def find_index(path: Path) -> Path | None:
    """Return the index of a diffusers folder, None if the folder is none."""
    return next((path / name for name in INDICES if (path / name).exists()), None)


def read(path: Path, folders: Iterable[str]) -> Folder:
    """Read the headers of a diffusers folder. ``folders``: of the components that count; others are left alone.

    Raises UnsupportedModelError when ``path`` is not a diffusers folder.
    Raises CorruptFileError when a part of it is damaged.
    """
    index_file = find_index(path)
    if index_file is None:
        raise UnsupportedModelError(
            path, f"is a directory without {' and without '.join(INDICES)}, so not a diffusers model"
        )
    index = read_json(index_file)
    pipeline = index.get("_class_name")
    components: dict[str, Header] = {}
    for name in folders:
        if _has(index.get(name), path / name):
            components[name] = _component(path / name, index_file.name)
    scheduler_file = path / "scheduler" / "scheduler_config.json"
    scheduler = read_json(scheduler_file) if scheduler_file.exists() else {}
    homes = [path, path / "scheduler", *(path / name for name in components)]
    settings = [index_file, scheduler_file, *(file for name in components for file in (path / name).glob("*.json"))]
    watched = tuple(sorted(found for found in {*homes, *settings} if found.exists()))
    return Folder(path, str(pipeline), index, components, scheduler, watched)


def _has(entry: object, folder: Path) -> bool:
    """Return whether an index says that there is a component. ``entry``: what it has for the component's name."""
    if not isinstance(entry, list) or not entry:
        return False
    library, *rest = cast("list[object]", entry)
    # A modular pipeline's index has a third value, and null for the class of a component that was not loaded.
    return all((library, *rest)) or (len(rest) > 1 and folder.is_dir())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises CorruptFileError when the file holds anything else, UnreadableFileError when it cannot be read.
    """
    try:
        if path.stat().st_size > _MOST_JSON_BYTES:
            raise CorruptFileError(path, "is far larger than a settings file")
        value: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise UnreadableFileError(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(path, f"is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CorruptFileError(path, f"is a JSON {type(value).__name__}, not an object")
    return cast("dict[str, Any]", value)


def _component(folder: Path, index_name: str) -> Header:
    """Read the weights of a component. Safetensors come before pickles, full precision before variants, one file before
    shards.

    ``index_name``: of the index that names it.
    """
    for suffix, reader in ((".safetensors", safetensors.read_header), (".bin", pickle.read_header)):
        for variant in _VARIANTS:
            for stem in _STEMS:
                single = folder / f"{stem}{variant}{suffix}"
                if single.exists():
                    return reader(single)
                for index in (
                    folder / f"{stem}{suffix}.index{variant}.json",
                    folder / f"{stem}{variant}{suffix}.index.json",
                ):
                    if index.exists():
                        return _shards(index, reader)
    if folder.is_dir():
        raise CorruptFileError(folder, "holds no weights (looked for .safetensors and .bin)")
    raise CorruptFileError(folder, f"is named in {index_name}, but is not there")


def _shards(index: Path, reader: Callable[[Path], Header]) -> Header:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in cast("dict[str, Any]", table).values()):
        raise CorruptFileError(index, "has no weight_map of names to files")
    weight_map = cast("dict[str, str]", table)
    tensors: dict[str, TensorInfo] = {}
    metadata: list[Mapping[str, str]] = []
    form = "safetensors"
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise CorruptFileError(index, f"names a shard outside its folder: {name!r}")
        shard = reader(index.parent / name)
        form = shard.format
        tensors.update(shard.tensors)
        metadata.append(shard.metadata)
    lost = [name for name in weight_map if name not in tensors]
    if lost:
        raise CorruptFileError(index, f"names tensor {lost[0]!r}, which is not in the shard {weight_map[lost[0]]}")
    return Header(index, form, tensors, merge_metadata(index, metadata))
