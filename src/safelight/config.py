"""Settings, and the source of each value: flags, ``SAFELIGHT_*`` variables, a file, or the default, in this order.

A setting that InvokeAI has too has InvokeAI's name. The file may be an ``invokeai.yaml`` (before version 4
``invoke.yaml``). Safelight reports entries of the file that it does not know, and never drops them silently.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from platformdirs import user_data_path
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from safelight.errors import SettingError, UnreadableFileError
from safelight.files import write_whole
from safelight.request.run_settings import AttentionType, Precision, SliceSize

FILE = "safelight.yaml"

"""The default file of settings, in the root."""

FILE_VERSION = 1
"""Version of the file of settings. A file with a newer version is rejected, never partly read."""

SECRETS = ("api_key",)
"""Settings whose values are never shown. Safelight writes a file with such a value readable by its owner only."""


class Settings(BaseModel):
    """Every setting with its default. Gigabytes are 2^30 bytes. For None, Safelight chooses a value for the machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    root: Path = Field(
        default_factory=lambda: user_data_path("safelight", appauthor=False),
        description="the folder of models, images and all other data",
    )
    device: Literal["auto", "cpu", "cuda", "mps", "simulated"] = Field(
        default="auto",
        description="the device that computes; auto uses a GPU if there is one",
    )
    precision: Precision = Field(
        default="auto",
        description="fp32, bf16 or fp16; auto is fp32 on a CPU, else a dtype that the device computes correctly",
    )
    attention_type: AttentionType = Field(
        default="auto",
        description="torch-sdp, normal, sliced, xformers, flash or sage; auto is the fastest that computes correctly",
    )
    attention_types: dict[str, AttentionType] = Field(
        default_factory=dict[str, AttentionType],
        description="attention_type of single models or bases, by name, such as {sdxl: sliced}",
    )
    attention_slice_size: SliceSize = Field(
        default="auto",
        description="heads that sliced computes at once: 1 to 8; balanced and auto are half of all heads, max is one",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="threads for computing; default: all cores. Another number can change the last bits of an image",
    )
    max_cache_ram_gb: float | None = Field(
        default=None,
        gt=0,
        description="limit of host memory for models; default: what the machine, containers and ulimit allow",
    )
    max_cache_vram_gb: float | None = Field(
        default=None,
        gt=0,
        description="limit of device memory for models; default: all that computing does not need",
    )
    device_working_mem_gb: float | None = Field(
        default=None,
        gt=0,
        description="device memory reserved for computing; default: measured for each model and size",
    )
    enable_partial_loading: bool = Field(
        default=True,
        description="if a model does not fit, keep some of its parts in memory and stream the others",
    )
    keep_ram_copy_of_weights: bool = Field(
        default=True,
        description="keep a copy in host memory of weights on the device, so that they can be loaded again faster",
    )
    log_memory_usage: bool = Field(
        default=False,
        description="log every step of every plan, with its reason",
    )
    verify_transfers: Literal["auto", "always", "first", "sample", "off"] = Field(
        default="auto",
        description="which bytes in memory are checked again; auto: all, as long as that takes under 2 % of the time",
    )
    canary: Literal["switch", "off"] = Field(
        default="off",
        description="switch: after each switch, compare a tiny image with one from a process that held no other model",
    )
    isolate: bool = Field(
        default=False,
        description="make every image in a process that never held another model",
    )
    log_format: Literal["plain", "json"] = Field(
        default="plain",
        description="format of the messages of the server and its worker: plain text, or one JSON object per line",
    )
    host: str = Field(
        default="127.0.0.1",
        description="the address on which the server listens; any address other than localhost needs an api_key",
    )
    port: int = Field(default=9090, ge=0, le=65535, description="the server's port; 0 selects a free one")
    api_key: SecretStr | None = Field(
        default=None,
        min_length=8,
        description="clients must send it, as a bearer token or as the password of basic authentication",
    )
    api_key_file: Path | None = Field(
        default=None,
        description="a file with the api_key in its first line",
    )
    default_model: str | None = Field(
        default=None,
        description="the model of commands, pages and clients that name none; default: the first by name",
    )
    default_seed: int | None = Field(
        default=None,
        ge=0,
        le=2**32 - 1,
        description="the seed of commands without one, for scripts that compare images; default: random",
    )
    model_folders: tuple[Path, ...] = Field(
        default=(),
        description="folders from which clients may add checkpoints over HTTP; default: none",
    )
    trash_days: float = Field(
        default=30.0,
        ge=0,
        description="days for which unused input images stay in the trash before they are deleted",
    )
    max_queue_size: int = Field(default=10_000, ge=1, description="limit of waiting jobs")
    queue_overtakes: int = Field(
        default=64,
        ge=0,
        description="later jobs that may overtake a waiting one to save switches; 0 means first come, first served",
    )
    queue_delay_seconds: float = Field(
        default=600.0,
        ge=0,
        description="seconds for which later jobs may delay a waiting one",
    )
    max_pixels: int = Field(default=4096 * 4096, ge=64, description="limit of width times height in the server")
    max_steps: int = Field(default=150, ge=1, description="limit of steps in the server")
    max_images: int = Field(default=16, ge=1, description="limit of images per request in the server")
    max_prompt_chars: int = Field(default=20_000, ge=1, description="limit of characters per prompt in the server")
    max_body_bytes: int = Field(default=32 << 20, ge=1024, description="limit of bytes in a request's body")
    shutdown_seconds: float = Field(
        default=10.0,
        ge=0,
        description="seconds that a job has to finish when the server stops, before it returns to the queue",
    )
    spare_worker: bool = Field(
        default=True,
        description="keep a second process with all imports ready, in case the worker dies",
    )

    @field_validator("attention_types", mode="before")
    @classmethod
    def _written(cls, value: object) -> object:
        """Parse the text of a variable or flag: ``{sdxl: sliced, my-model: normal}``."""
        return yaml.safe_load(value) if isinstance(value, str) else value

    @field_validator("model_folders", mode="before")
    @classmethod
    def _folders(cls, value: object) -> object:
        """Parse text: a YAML list, or folders with the system's separator between them (``:``; on Windows ``;``)."""
        if not isinstance(value, str):
            return value
        return yaml.safe_load(value) if value.startswith("[") else [part for part in value.split(os.pathsep) if part]

    @field_validator("attention_slice_size", mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        return str(value) if isinstance(value, int) else value


@dataclass(frozen=True, slots=True)
class Loaded:
    """Loaded settings.

    ``origins``: the source of each setting's value, by name.
    ``ignored``: unknown entries of the file and unknown variables, with the reason why they are ignored.
    ``exposed``: the file, if it contains a secret and others than its owner may read it.
    """

    settings: Settings
    origins: Mapping[str, str]
    ignored: Mapping[str, str]
    exposed: Path | None = None


_OBSOLETE = "InvokeAI itself ignores it since version 5.6; use {} instead"

OBSOLETE: Mapping[str, str] = {
    **dict.fromkeys(("ram", "ram_cache_size", "max_cache_size"), _OBSOLETE.format("max_cache_ram_gb")),
    **dict.fromkeys(("vram", "vram_cache_size", "max_vram_cache_size"), _OBSOLETE.format("max_cache_vram_gb")),
}
"""Settings of older InvokeAI files, and why Safelight ignores them. Their values have another meaning: ``vram`` had the
default 0.25 GB, and was not a limit of device memory."""

INVOKEAI_VALUES: Mapping[str, Mapping[object, object]] = {
    "precision": {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "autocast": "auto"},
    "device": {"cuda:0": "cuda"},
    "log_format": {"color": "plain", "syslog": "plain", "legacy": "plain"},
}
"""Safelight's value for each value of InvokeAI, by setting."""


def load(root: Path | None = None, file: Path | None = None, **flags: Any) -> Settings:
    """Load the settings, as :func:`explained` does."""
    return explained(root, file, **flags).settings


def explained(root: Path | None = None, file: Path | None = None, **flags: Any) -> Loaded:
    """Load the settings and the source of each value.

    ``root``, ``flags``: override all other sources; None for a flag that was not given.
    ``file``: a YAML file of settings, or InvokeAI's; default: ``safelight.yaml`` in the root, if it exists.
    Raises SettingError, which names the setting and the source of its value.
    Raises UnreadableFileError when a file cannot be read.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    given = {"root": root, **flags}
    for name in Settings.model_fields:
        variable = f"SAFELIGHT_{name.upper()}"
        if given.get(name) is not None:
            values[name], origins[name] = given[name], f"--{name.replace('_', '-')}"
        elif os.environ.get(variable):
            values[name], origins[name] = os.environ[variable], variable
    home = Path(values.get("root") or Settings().root).expanduser().absolute()
    known_variables = {f"SAFELIGHT_{name.upper()}" for name in Settings.model_fields}
    ignored = {
        variable: "unknown variable"
        for variable in os.environ
        if variable.startswith("SAFELIGHT_") and variable not in known_variables
    }
    chosen = file or home / FILE
    if file is not None or chosen.exists():
        entries = _yaml(chosen)
        _refuse_newer(chosen, entries)
        for key, value in _flat(entries).items():
            if key not in Settings.model_fields or key == "root":
                ignored[key] = OBSOLETE.get(key, "unknown setting")
            elif key not in values and value is not None:
                known = INVOKEAI_VALUES.get(key, {})
                values[key] = known.get(value, value) if isinstance(value, str) else value
                origins[key] = str(chosen)
    values["root"] = home
    if values.get("api_key_file") and "api_key" not in values:
        values["api_key"] = _secret(Path(values["api_key_file"]).expanduser())
        origins["api_key"] = str(values["api_key_file"])
    if home.exists() and not home.is_dir():
        raise SettingError("root", str(home), origins.get("root", "the default"), "is a file, not a folder")
    try:
        settings = Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        value = "…" if name in SECRETS else first["input"]
        raise SettingError(name, value, origins.get(name, "the default"), first["msg"]) from error
    shown = {n: origins.get(n, "default") for n in Settings.model_fields}
    return Loaded(settings, shown, ignored, chosen if _exposed(chosen, origins) else None)


def _secret(path: Path) -> str:
    """Return the first line of a file. Raises UnreadableFileError."""
    try:
        return path.read_text().partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableFileError(path, f"cannot be read as api_key_file ({error})") from error


def _exposed(file: Path, origins: Mapping[str, str]) -> bool:
    """Return whether a secret came from a file that others than its owner may read."""
    held = any(origins.get(name) == str(file) for name in SECRETS)
    return held and os.name == "posix" and bool(file.stat().st_mode & 0o077)


VERSION_KEY = "safelight_settings_version"


def _refuse_newer(path: Path, entries: Mapping[str, Any]) -> None:
    """Raise SettingError if a newer Safelight wrote the file. Remove the version from the entries otherwise."""
    version = entries.pop(VERSION_KEY, FILE_VERSION) if isinstance(entries, dict) else FILE_VERSION
    if not isinstance(version, int) or version > FILE_VERSION:
        problem = f"this Safelight reads versions up to {FILE_VERSION}; a newer Safelight wrote the file"
        raise SettingError(VERSION_KEY, version, str(path), problem)


def write(root: Path, name: str, text: str) -> object:
    """Set one value in the root's ``safelight.yaml``. Other values stay; comments are lost.

    ``text``: the value as YAML.
    Returns the parsed value.
    Raises SettingError for a name or value that is not allowed, and then writes nothing.
    """
    path = root / FILE
    _refuse_unknown(name, text)
    entries = _yaml(path) if path.exists() else {}
    _refuse_newer(path, entries)
    try:
        value: Any = yaml.safe_load(text)
        settings = Settings(**{name: value})
    except (ValidationError, yaml.YAMLError) as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "is not YAML"
        raise SettingError(name, "…" if name in SECRETS else text, "the command", problem) from error
    values = {VERSION_KEY: FILE_VERSION, **entries, name: value}
    mode = 0o600 if any(values.get(secret) for secret in SECRETS) else 0o644
    write_whole(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode(), mode)
    return getattr(settings, name)


def unset(root: Path, name: str) -> None:
    """Remove one value from the root's ``safelight.yaml``. Other values stay; comments are lost.

    Raises SettingError for an unknown name, and for a setting that the file does not contain.
    """
    path = root / FILE
    _refuse_unknown(name, "")
    entries = _yaml(path) if path.exists() else {}
    _refuse_newer(path, entries)
    if name not in entries:
        raise SettingError(name, "", str(path), "is not set there; `safelight config show` lists the source")
    values = {key: value for key, value in entries.items() if key != name}
    mode = 0o600 if any(values.get(secret) for secret in SECRETS) else 0o644
    write_whole(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode(), mode)


def _refuse_unknown(name: str, text: str) -> None:
    if name not in Settings.model_fields or name == "root":
        near = difflib.get_close_matches(name, Settings.model_fields, 1)
        raise SettingError(name, text, "the command", f"unknown setting{f'; did you mean {near[0]}?' if near else ''}")


def _yaml(path: Path) -> dict[str, Any]:
    try:
        value: Any = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UnreadableFileError(path, f"cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UnreadableFileError(path, f"is not YAML ({' '.join(str(error).split())})") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UnreadableFileError(path, f"is a YAML {type(value).__name__}, not a mapping of names to values")
    return cast("dict[str, Any]", value)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Merge all sections. InvokeAI's files before version 4 have sections (``InvokeAI: Model Cache: ram: 8``)."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and key not in Settings.model_fields:
            out |= _flat(cast("Mapping[str, Any]", value))
        else:
            out[str(key)] = value
    return out
