"""Reads the sources of settings, says where each value came from, and writes ``safelight.yaml``.

The file may also be InvokeAI's ``invokeai.yaml`` (before version 4 ``invoke.yaml``). Safelight reports entries that it
does not know, and never drops them silently.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource, InitSettingsSource, PydanticBaseSettingsSource

from safelight.errors import SettingError, UnreadableFileError
from safelight.files.disk import write_whole
from safelight.setting_descriptions import describe_allowed
from safelight.settings import (
    OBSOLETE,
    PREFIX,
    SECRETS,
    Settings,
    default_root,
    details_of,
    variable_of,
)

FILE = "safelight.yaml"
"""The default file of settings, in the root."""

FILE_VERSION = 1
"""Version of the file of settings. A file with a newer version is rejected, never partly read."""

VERSION_KEY = "safelight_settings_version"

COMMAND = "the command"
"""The source of a value that a caller gives to :func:`write_setting`."""


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """Settings and their sources.

    ``origins``: the source of each setting's value, by name.
    ``ignored``: unknown entries of the file and unknown variables, with the reason why they are ignored.
    ``exposed``: the file, if it contains a secret and others than its owner may read it.
    ``file``: the file of settings that the user chose; None for that of the root.
    """

    settings: Settings
    origins: Mapping[str, str]
    ignored: Mapping[str, str]
    exposed: Path | None = None
    file: Path | None = None


class _Source(PydanticBaseSettingsSource):
    """A source of settings that reads a file."""

    def __init__(self) -> None:
        super().__init__(Settings)

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Raise NotImplementedError: calling the source reads all fields at once."""
        raise NotImplementedError


class SettingsFile(_Source):
    """The values of a YAML file: ours or InvokeAI's.

    ``path``: the file; None for ``safelight.yaml`` in the root, which need not exist.
    ``ignored``: unknown entries of the file, with the reason why they are ignored.
    """

    def __init__(self, path: Path | None) -> None:
        super().__init__()
        self.path = path
        self.ignored: dict[str, str] = {}

    def __call__(self) -> dict[str, Any]:
        """Return the values that no stronger source has.

        Raises UnreadableFileError when the file cannot be read.
        Raises SettingError when a newer Safelight wrote the file.
        """
        if self.path is None:
            root = self.current_state.get("root") or default_root()
            self.path = Path(root).expanduser().absolute() / FILE
            if not self.path.exists():
                return {}
        values: dict[str, Any] = {}
        for name, value in _flatten(_read_entries(self.path)).items():
            if name not in Settings.model_fields or name == "root":
                self.ignored[name] = OBSOLETE.get(name, "unknown setting")
            elif value is not None and name not in self.current_state:
                known = details_of(name).invokeai_values
                values[name] = known.get(value, value) if isinstance(value, str) else value
        return values


class KeyFile(_Source):
    """The ``api_key`` in the first line of ``api_key_file``, if no other source has an ``api_key``."""

    path: Path | None = None
    """The file, once it is read."""

    def __call__(self) -> dict[str, Any]:
        """Return the key. Raises UnreadableFileError when the file cannot be read."""
        if not self.current_state.get("api_key_file") or "api_key" in self.current_state:
            return {}
        self.path = path = Path(self.current_state["api_key_file"]).expanduser()
        try:
            return {"api_key": path.read_text().partition("\n")[0].strip()}
        except (OSError, UnicodeDecodeError) as error:
            raise UnreadableFileError(path, f"cannot be read as api_key_file ({error})") from error


def load_settings(root: Path | None = None, file: Path | None = None, **given: Any) -> Settings:
    """Load the settings, as :func:`explain_settings` does."""
    return explain_settings(root, file, **given).settings


def explain_settings(root: Path | None = None, file: Path | None = None, **given: Any) -> LoadedSettings:
    """Load the settings and the source of each value.

    ``root``, ``given``: values that override all other sources; None for a value that was not given.
    ``file``: a YAML file of settings, or InvokeAI's; default: ``safelight.yaml`` in the root, if it exists.
    Raises SettingError, which names the setting and the source of its value.
    Raises UnreadableFileError when a file cannot be read.
    """
    for name, value in given.items():
        _refuse_unknown(name, value)
    values: dict[str, Any] = {"root": root, **given}
    values = {name: value for name, value in values.items() if value is not None}
    settings_file, key_file = SettingsFile(file), KeyFile()
    values["below"] = (settings_file, key_file)

    def origin(name: str) -> str:
        labels = {
            InitSettingsSource.__name__: f"--{name.replace('_', '-')}",
            EnvSettingsSource.__name__: variable_of(name),
            SettingsFile.__name__: str(settings_file.path),
            KeyFile.__name__: str(key_file.path),
        }
        read = key_file.settings_sources_data
        return next((labels[source] for source, held in read.items() if name in held), "default")

    try:
        settings = Settings(**values)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        raise _refusal(error, origin(name)) from error
    if settings.root.exists() and not settings.root.is_dir():
        raise SettingError("root", str(settings.root), origin("root"), "is a file, not a folder")
    origins = {name: origin(name) for name in Settings.model_fields}
    ignored = {**_unknown_variables(), **settings_file.ignored}
    path = settings_file.path
    has_secret = any(origins[name] == str(path) for name in SECRETS)
    exposed = path if path is not None and has_secret and _is_exposed(path) else None
    return LoadedSettings(settings, origins, ignored, exposed, file)


def _refusal(error: ValidationError, origin: str) -> SettingError:
    """Translate an error of pydantic into one sentence with the allowed values. It never contains a secret."""
    first = error.errors()[0]
    name = str(first["loc"][0])
    value = "…" if name in SECRETS else first["input"]
    # YAML reads digits as a number, even in a key.
    is_number = first["type"] == "string_type" and isinstance(first["input"], int | float)
    remedy = "; write it in quotes" if is_number else ""
    return SettingError(name, value, origin, f"must be {describe_allowed(name)}{remedy}")


def _unknown_variables() -> dict[str, str]:
    known = {variable_of(name) for name in Settings.model_fields}
    return {name: "unknown variable" for name in os.environ if name.startswith(PREFIX) and name not in known}


def _is_exposed(file: Path) -> bool:
    """Return whether others than the file's owner may read it."""
    return os.name == "posix" and bool(file.stat().st_mode & 0o077)


def write_setting(root: Path, name: str, text: str) -> object:
    """Set one value in the root's ``safelight.yaml``. Other values stay; comments are lost.

    ``text``: the value as YAML.
    Returns the parsed value.
    Raises SettingError for a name or value that is not allowed, and then writes nothing.
    """
    import yaml

    path = root / FILE
    _refuse_unknown(name, text)
    entries = _read_entries(path) if path.exists() else {}
    try:
        value: Any = yaml.safe_load(text)
        settings = Settings(**{name: value})
    except ValidationError as error:
        raise _refusal(error, COMMAND) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # PyYAML also raises what Python raises for a date that does not exist, and for deep lists.
        raise SettingError(name, "…" if name in SECRETS else text[:100], COMMAND, "is not YAML") from error
    _write_entries(path, {**entries, name: value})
    return getattr(settings, name)


def unset_setting(root: Path, name: str) -> None:
    """Remove one value from the root's ``safelight.yaml``. Other values stay; comments are lost.

    Raises SettingError for an unknown name, and for a setting that the file does not contain.
    """
    path = root / FILE
    _refuse_unknown(name, "")
    entries = _read_entries(path) if path.exists() else {}
    if name not in entries:
        raise SettingError(name, "", str(path), "is not set there; `safelight config show` lists the source")
    _write_entries(path, {key: value for key, value in entries.items() if key != name})


def _refuse_unknown(name: str, value: object) -> None:
    known = [field for field in Settings.model_fields if field != "root"]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        raise SettingError(name, value, COMMAND, f"unknown setting{f'; did you mean {near[0]}?' if near else ''}")


def _write_entries(path: Path, entries: Mapping[str, Any]) -> None:
    """Write a file of settings. Only its owner may read a file with a secret."""
    import yaml

    values = {VERSION_KEY: FILE_VERSION, **entries}
    mode = 0o600 if any(values.get(secret) for secret in SECRETS) else 0o644
    write_whole(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode(), mode)


def _read_entries(path: Path) -> dict[str, Any]:
    """Return the entries of a YAML file, without its version.

    Raises UnreadableFileError when the file cannot be read or has no mapping.
    Raises SettingError when a newer Safelight wrote the file.
    """
    import yaml  # takes 10 ms, and most commands read no YAML

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
    entries = cast("dict[str, Any]", value)
    version = entries.pop(VERSION_KEY, FILE_VERSION)
    if not isinstance(version, int) or version > FILE_VERSION:
        problem = f"this Safelight reads versions up to {FILE_VERSION}; a newer Safelight wrote the file"
        raise SettingError(VERSION_KEY, version, str(path), problem)
    return entries


def _flatten(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Merge all sections. InvokeAI's files before version 4 have sections (``InvokeAI: Model Cache: ram: 8``)."""
    out: dict[str, Any] = {}
    for key, value in entries.items():
        if isinstance(value, Mapping) and key not in Settings.model_fields:
            out |= _flatten(cast("Mapping[str, Any]", value))
        else:
            out[str(key)] = value
    return out
