"""Finds the models of other programs: in which folders they are, and what the programs know of them.

- AUTOMATIC1111 and Forge: ``models/``, ``embeddings/``, and the folder of the ControlNet extension
- ComfyUI: ``models/``, and the folders that ``extra_model_paths.yaml`` names
- SwarmUI: ``Models/``
- InvokeAI 4 and later: the table ``models`` of ``databases/invokeai.db``, with names, trigger words and
  defaults
- any other folder, such as one into which kohya's scripts write: the folder itself
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from safelight.catalog import paths
from safelight.catalog.found import Found, found_in
from safelight.catalog.program_defaults import NONE, ProgramDefaults, of_invoke
from safelight.catalog.trigger_words import cleaned
from safelight.errors import CorruptFileError, FileError, InputError
from safelight.files.disk import read_file
from safelight.files.json_values import json_list, json_object

EXTRA_PATHS = "extra_model_paths.yaml"
COMFY_SIGNS = ("comfy", "custom_nodes", EXTRA_PATHS)
SWARM_SIGNS = ("src/SwarmUI.csproj", "Data", "dlbackend")
INVOKE_DATABASE = Path("databases/invokeai.db")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file or diffusers folder of a program.

    ``name``, ``trigger_words``, ``defaults``: as the program has them; "" and empty if it has none.
    """

    found: Found
    name: str = ""
    trigger_words: tuple[str, ...] = ()
    defaults: ProgramDefaults = NONE


@dataclass(frozen=True, slots=True)
class Program:
    """A program's models. ``label``: what the program is called, "" for a plain folder."""

    label: str
    candidates: tuple[Candidate, ...]


def read(path: Path) -> Program:
    """Return the models of the program whose folder, or whose ``extra_model_paths.yaml``, a path is.

    Raises InputError if there is no such folder, CorruptFileError for a damaged file of the program.
    """
    path = Path(os.path.normpath(paths.user_path(str(path)).absolute()))
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        return _in_folders("ComfyUI", list(_extra_folders(path)))
    if not path.is_dir():
        raise InputError(f"{path}: is no folder; name the folder of the program, or one with models")
    if (path / INVOKE_DATABASE).is_file():
        return Program("InvokeAI", tuple(_of_invoke(path)))
    if (path / "models/Stable-diffusion").is_dir():
        more = ("models", "embeddings", "extensions/sd-webui-controlnet/models")
        return _in_folders("AUTOMATIC1111 or Forge", [path / name for name in more])
    if (path / "Models").is_dir() and any((path / name).exists() for name in SWARM_SIGNS):
        return _in_folders("SwarmUI", [path / "Models"])
    if (path / "models").is_dir() and any((path / name).exists() for name in COMFY_SIGNS):
        extra = path / EXTRA_PATHS
        return _in_folders("ComfyUI", [path / "models", *(_extra_folders(extra) if extra.is_file() else ())])
    return _in_folders("", [path])


def _in_folders(label: str, folders: list[Path]) -> Program:
    """Return what folders have. A file that is in two of them, or linked there, counts once."""
    found: dict[str, Found] = {}
    for folder in folders:
        if os.path.isdir(folder):
            for one in found_in(folder):
                found.setdefault(os.path.realpath(one.path), one)
    return Program(label, tuple(Candidate(one) for one in found.values()))


def _extra_folders(file: Path) -> Iterator[Path]:
    """Yield the folders that ComfyUI's ``extra_model_paths.yaml`` names.

    Each section has a ``base_path``, and for each kind of model one folder in each line.
    """
    for section in _yaml(file).values():
        values = json_object(section) if isinstance(section, dict) else {}
        base = file.parent / _expanded(str(values.get("base_path") or "."))
        for kind, lines in values.items():
            if kind not in ("base_path", "is_default", "custom_nodes", "configs") and isinstance(lines, str):
                folders = (base / _expanded(line.strip()) for line in lines.splitlines() if line.strip())
                yield from (Path(os.path.normpath(folder)) for folder in folders)


def _of_invoke(root: Path) -> Iterator[Candidate]:
    """Yield the models that InvokeAI's database lists. Paths in it are relative to the folder ``models``."""
    database = root / INVOKE_DATABASE
    try:
        # InvokeAI may have it open, so it is only read.
        with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as opened:
            rows = opened.execute("SELECT config FROM models").fetchall()
    except sqlite3.Error as error:
        problem = f"has no table of models that can be read ({error}); InvokeAI 4 and later have one"
        raise CorruptFileError(database, problem) from error
    folder = _invoke_folder(root)
    listed = [json_object(written) for (written,) in rows]
    names = {str(values.get("key")): str(values.get("name") or "") for values in listed}
    for values in listed:
        path = folder / str(values.get("path") or "")
        words = tuple(sorted(cleaned(map(str, json_list(values.get("trigger_phrases"))))))
        settings = json_object(values.get("default_settings"))
        defaults = of_invoke(settings, names.get(str(settings.get("vae")), ""))
        if values.get("path"):
            yield Candidate(Found(path, within=True), str(values.get("name") or ""), words, defaults)


def _invoke_folder(root: Path) -> Path:
    """Return the folder of models: ``models_dir`` of ``invokeai.yaml``, relative to the root."""
    with contextlib.suppress(FileError):
        return root / _expanded(str(_yaml(root / "invokeai.yaml").get("models_dir") or "models"))
    return root / "models"


def _yaml(file: Path) -> dict[str, Any]:
    """Return the values of a YAML file, empty if they are none. Raises CorruptFileError, UnreadableFileError."""
    written = read_file(file)
    try:
        values: Any = yaml.safe_load(written)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CorruptFileError(file, f"is no YAML ({error})") from error
    return json_object(values) if isinstance(values, dict) else {}


def _expanded(text: str) -> Path:
    """Return a path with its variables and ``~`` replaced. Raises InputError for the home of an unknown user."""
    return paths.user_path(os.path.expandvars(text))
