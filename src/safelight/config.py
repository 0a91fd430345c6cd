"""Settings, and where each value came from: flags, ``SAFELIGHT_*`` variables, a file, or the default, in this order.

Names are InvokeAI's where they mean the same; ``invokeai.yaml`` (before version 4 ``invoke.yaml``) can be given as the
file. What it says that has no meaning here is named, never dropped in silence.
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

"""Looked for in the root."""

FILE_VERSION = 1
"""Of the file of settings; a newer one is refused, never half read."""

SECRETS = ("api_key",)
"""Settings that are never shown; a file that holds one is readable by its owner only."""


class Settings(BaseModel):
    """Every setting with its default. Gigabytes are 2^30 bytes; None lets Safelight decide by the machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    root: Path = Field(
        default_factory=lambda: user_data_path("safelight", appauthor=False),
        description="where everything lives",
    )
    device: Literal["auto", "cpu", "cuda", "mps", "simulated"] = Field(
        default="auto",
        description="what computes; auto takes a GPU where there is one",
    )
    precision: Precision = Field(
        default="auto",
        description="fp32, bf16, fp16; auto is fp32 on a CPU, else what the device computes rightly",
    )
    attention_type: AttentionType = Field(
        default="auto",
        description="torch-sdp, normal, sliced, xformers, flash or sage; auto: the fastest that computes rightly",
    )
    attention_types: dict[str, AttentionType] = Field(
        default_factory=dict[str, AttentionType],
        description="another attention_type for some: by a model's name or a base, as {sdxl: sliced}",
    )
    attention_slice_size: SliceSize = Field(
        default="auto",
        description="heads that sliced computes at once: 1 to 8; balanced and auto are half of them, max is one",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="for computing; all cores by default. Another number can change the last bits of an image",
    )
    max_cache_ram_gb: float | None = Field(
        default=None,
        gt=0,
        description="most host memory for models; by default what the machine, containers and ulimit leave",
    )
    max_cache_vram_gb: float | None = Field(
        default=None,
        gt=0,
        description="most device memory for models; by default what computing leaves",
    )
    device_working_mem_gb: float | None = Field(
        default=None,
        gt=0,
        description="kept free for computing on a device; measured for each model and size by default",
    )
    enable_partial_loading: bool = Field(
        default=True,
        description="keep parts of a model that does not fit, and stream the others",
    )
    keep_ram_copy_of_weights: bool = Field(
        default=True,
        description="keep in host memory what is on the device, so that it comes back faster",
    )
    log_memory_usage: bool = Field(
        default=False,
        description="log every step of every plan, with its reason",
    )
    verify_transfers: Literal["auto", "always", "first", "sample", "off"] = Field(
        default="auto",
        description="which bytes in memory are summed again; auto: all, as far as that costs under 2 % of the time",
    )
    canary: Literal["switch", "off"] = Field(
        default="off",
        description="switch: after each switch a tiny image is compared with one of a process that held no other model",
    )
    isolate: bool = Field(
        default=False,
        description="make every image in a process that has never held another model",
    )
    log_format: Literal["plain", "json"] = Field(
        default="plain",
        description="how the server and its worker write messages: for people, or an object to a line",
    )
    host: str = Field(
        default="127.0.0.1",
        description="the address that the server listens at; another than this machine's own needs an api_key",
    )
    port: int = Field(default=9090, ge=0, le=65535, description="the server's port; 0 takes a free one")
    api_key: SecretStr | None = Field(
        default=None,
        min_length=8,
        description="who asks the server must give it: as a bearer token, or as the password of basic authentication",
    )
    api_key_file: Path | None = Field(
        default=None,
        description="a file that holds the api_key, in its first line",
    )
    default_model: str | None = Field(
        default=None,
        description="where no model is named: on the command line, on the page and by clients; else the first by name",
    )
    default_seed: int | None = Field(
        default=None,
        ge=0,
        le=2**32 - 1,
        description="the seed of commands that give none, for scripts that compare images; random by default",
    )
    model_folders: tuple[Path, ...] = Field(
        default=(),
        description="folders from which checkpoints may be added over HTTP; none by default",
    )
    trash_days: float = Field(
        default=30.0,
        ge=0,
        description="for which input images that nothing names any more lie in the trash before they are removed",
    )
    max_queue_size: int = Field(default=10_000, ge=1, description="jobs that may wait")
    queue_overtakes: int = Field(
        default=64,
        ge=0,
        description="later jobs that may go before a waiting one, to save switches; 0 is first come, first served",
    )
    queue_delay_seconds: float = Field(
        default=600.0,
        ge=0,
        description="for which later jobs may delay a waiting one",
    )
    max_pixels: int = Field(default=4096 * 4096, ge=64, description="width times height that the server takes")
    max_steps: int = Field(default=150, ge=1, description="steps that the server takes")
    max_images: int = Field(default=16, ge=1, description="images in one request that the server takes")
    max_prompt_chars: int = Field(default=20_000, ge=1, description="characters of a prompt that the server takes")
    max_body_bytes: int = Field(default=32 << 20, ge=1024, description="bytes of a request's body")
    shutdown_seconds: float = Field(
        default=10.0,
        ge=0,
        description="for which a job may finish when the server is stopped, before it is put back into the queue",
    )
    spare_worker: bool = Field(
        default=True,
        description="keep a second process that has imported everything, for when the worker dies",
    )

    @field_validator("attention_types", mode="before")
    @classmethod
    def _written(cls, value: object) -> object:
        """A variable or flag has it as text: ``{sdxl: sliced, my-model: normal}``."""
        return yaml.safe_load(value) if isinstance(value, str) else value

    @field_validator("model_folders", mode="before")
    @classmethod
    def _folders(cls, value: object) -> object:
        """As text: a YAML list, or folders with the system's separator between them (a colon; ``;`` on Windows)."""
        if not isinstance(value, str):
            return value
        return yaml.safe_load(value) if value.startswith("[") else [part for part in value.split(os.pathsep) if part]

    @field_validator("attention_slice_size", mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        return str(value) if isinstance(value, int) else value


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings; ``origins``: for each name where its value came from; ``ignored``: what the file says beside them, and
    why it is not taken; ``exposed``: the file, if it holds a secret and others may read it."""

    settings: Settings
    origins: Mapping[str, str]
    ignored: Mapping[str, str]
    exposed: Path | None = None


_OBSOLETE = "InvokeAI itself ignores it since version 5.6; {} is what it has today"

OBSOLETE: Mapping[str, str] = {
    **dict.fromkeys(("ram", "ram_cache_size", "max_cache_size"), _OBSOLETE.format("max_cache_ram_gb")),
    **dict.fromkeys(("vram", "vram_cache_size", "max_vram_cache_size"), _OBSOLETE.format("max_cache_vram_gb")),
}
"""Settings of older InvokeAI files, and why they are not taken: 0.25 GB was the default of ``vram``, which was no limit
of what a device may hold."""

INVOKEAI_VALUES: Mapping[str, Mapping[object, object]] = {
    "precision": {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "autocast": "auto"},
    "device": {"cuda:0": "cuda"},
    "log_format": {"color": "plain", "syslog": "plain", "legacy": "plain"},
}
"""InvokeAI's values by ours."""


def load(root: Path | None = None, file: Path | None = None, **flags: Any) -> Settings:
    """The settings: see :func:`explained`."""
    return explained(root, file, **flags).settings


def explained(root: Path | None = None, file: Path | None = None, **flags: Any) -> Loaded:
    """The settings, and where each came from. ``root`` and ``flags`` (None for those not given) go above all else.

    ``file``: a YAML file of settings, or InvokeAI's; by default ``safelight.yaml`` in the root, if it is there.
    Raises SettingError, naming the setting and where its value came from, and UnreadableFileError.
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
        variable: "no such variable"
        for variable in os.environ
        if variable.startswith("SAFELIGHT_") and variable not in known_variables
    }
    chosen = file or home / FILE
    if file is not None or chosen.exists():
        told = _yaml(chosen)
        _refuse_newer(chosen, told)
        for key, value in _flat(told).items():
            if key not in Settings.model_fields or key == "root":
                ignored[key] = OBSOLETE.get(key, "no setting of Safelight")
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
    """The first line of a file. Raises UnreadableFileError."""
    try:
        return path.read_text().partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableFileError(path, f"cannot be read as api_key_file ({error})") from error


def _exposed(file: Path, origins: Mapping[str, str]) -> bool:
    """Whether settings that are secret came from a file that others than its owner may read."""
    held = any(origins.get(name) == str(file) for name in SECRETS)
    return held and os.name == "posix" and bool(file.stat().st_mode & 0o077)


VERSION_KEY = "safelight_settings_version"


def _refuse_newer(path: Path, told: Mapping[str, Any]) -> None:
    """Raise SettingError when a newer Safelight wrote the file; forget its version else."""
    version = told.pop(VERSION_KEY, FILE_VERSION) if isinstance(told, dict) else FILE_VERSION
    if not isinstance(version, int) or version > FILE_VERSION:
        problem = f"this Safelight reads up to version {FILE_VERSION}; the file was written by a newer one"
        raise SettingError(VERSION_KEY, version, str(path), problem)


def write(root: Path, name: str, text: str) -> object:
    """Set one value in ``safelight.yaml`` of the root, the others as they are; the value that it has now.

    Raises SettingError for a name or value that is not allowed; nothing is written then. Comments are not kept.
    """
    path = root / FILE
    _refuse_unknown(name, text)
    told = _yaml(path) if path.exists() else {}
    _refuse_newer(path, told)
    try:
        value: Any = yaml.safe_load(text)
        settings = Settings(**{name: value})
    except (ValidationError, yaml.YAMLError) as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "is not YAML"
        raise SettingError(name, "…" if name in SECRETS else text, "the command", problem) from error
    values = {VERSION_KEY: FILE_VERSION, **told, name: value}
    mode = 0o600 if any(values.get(secret) for secret in SECRETS) else 0o644
    write_whole(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode(), mode)
    return getattr(settings, name)


def unset(root: Path, name: str) -> None:
    """Remove one value from ``safelight.yaml`` of the root, the others as they are. Comments are not kept.

    Raises SettingError for a name that is no setting's, and for one that the file does not set.
    """
    path = root / FILE
    _refuse_unknown(name, "")
    held = _yaml(path) if path.exists() else {}
    _refuse_newer(path, held)
    if name not in held:
        raise SettingError(name, "", str(path), "is not set there; `safelight config show` says where it comes from")
    values = {key: value for key, value in held.items() if key != name}
    mode = 0o600 if any(values.get(secret) for secret in SECRETS) else 0o644
    write_whole(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode(), mode)


def _refuse_unknown(name: str, text: str) -> None:
    if name not in Settings.model_fields or name == "root":
        near = difflib.get_close_matches(name, Settings.model_fields, 1)
        raise SettingError(name, text, "the command", f"no such setting{f'; {near[0]} is one' if near else ''}")


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
        raise UnreadableFileError(path, f"is a {type(value).__name__}, not names with values")
    return cast("dict[str, Any]", value)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of all sections: InvokeAI's files before version 4 had some (``InvokeAI: Model Cache: ram: 8``)."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and key not in Settings.model_fields:
            out |= _flat(cast("Mapping[str, Any]", value))
        else:
            out[str(key)] = value
    return out
