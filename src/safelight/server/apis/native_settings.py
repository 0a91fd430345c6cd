"""Routes for the settings of the server."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Path as InPath
from pydantic import BaseModel, ConfigDict

from safelight.assembly.services import Services
from safelight.server.problems import RefusedError, documented
from safelight.setting_descriptions import choices_of, describe_allowed
from safelight.settings import SECRETS, Settings, details_of, variable_of
from safelight.settings_sources import explain_settings, unset_setting, write_setting

Name = Annotated[str, InPath(pattern="^[a-z0-9_]{1,60}$", description="a setting's name")]


class SettingModel(BaseModel):
    """A setting.

    ``value``: the one that the server started with; null for a secret that is set.
    ``origin``: where it came from.
    ``stored``: the value with which the server would start now. ``changes``: whether it is another one.
    ``may_change``: whether clients may change it.
    ``choices``: the allowed values, if there are only a few.
    ``allowed``, ``unit``, ``description``, ``default``: in words.
    """

    name: str
    group: str
    value: Any
    origin: str
    stored: Any
    changes: bool
    may_change: bool
    choices: list[str]
    allowed: str
    unit: str
    default: str
    description: str
    variable: str
    secret: bool


class SettingValue(BaseModel):
    """A value as in YAML. null removes it from safelight.yaml, so that the setting has its default again."""

    model_config = ConfigDict(extra="forbid")

    value: str | None


class SettingRoutes:
    """The routes for settings."""

    def __init__(self, control: Services) -> None:
        self._control, self._settings = control, control.settings
        self._values = control.settings.model_dump(mode="json")
        self._lock = threading.Lock()

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.get("/settings", tags=["server"])(self.all)
        api.put("/settings/{name}", tags=["server"], responses=documented(404, 409))(self.set)

    def all(self) -> list[SettingModel]:
        """List the settings, with where each value came from."""
        stored = self._stored()
        return [self._describe(name, stored) for name in Settings.model_fields]

    def set(self, name: Name, asked: SettingValue) -> SettingModel:
        """Write a setting into safelight.yaml of the root. It counts from the next start of the server.

        Who may reach the server, which files it reads and writes, and its limits are changed on its machine.
        """
        if name not in Settings.model_fields:
            raise RefusedError(404, "not_found", f"there is no setting {name}")
        if not _may_change(name):
            raise RefusedError(403, "forbidden", f"{name} can only be changed on the server's machine", "name")
        sources = self._control.sources
        if sources.file is not None:
            raise RefusedError(409, "other_file", f"this server reads {sources.file}; change {name} there", "name")
        origin = sources.origins[name]
        if origin in (variable_of(name), f"--{name.replace('_', '-')}"):
            raise RefusedError(409, "stronger", f"{name} is set by {origin}, which counts more than the file", "name")
        with self._lock:
            if asked.value is None:
                unset_setting(self._settings.root, name)
            else:
                write_setting(self._settings.root, name, asked.value)
        return self._describe(name, self._stored())

    def _stored(self) -> Mapping[str, Any]:
        """Return the values with which the server would start now. Raises SettingError for a file that is damaged."""
        file = self._control.sources.file
        return explain_settings(self._settings.root, file).settings.model_dump(mode="json")

    def _describe(self, name: str, stored: Mapping[str, Any]) -> SettingModel:
        details, secret = details_of(name), name in SECRETS
        return SettingModel(
            name=name,
            group=details.group,
            value=None if secret else self._values[name],
            origin=self._control.sources.origins[name],
            stored=None if secret else stored[name],
            changes=stored[name] != self._control.stored_at_start[name],
            may_change=_may_change(name),
            choices=list(choices_of(name)),
            allowed=describe_allowed(name),
            unit=details.unit,
            default=details.default_text or str(Settings.model_fields[name].default),
            description=Settings.model_fields[name].description or "",
            variable=variable_of(name),
            secret=secret,
        )


CHANGEABLE = frozenset({"Computing", "Memory", "Checks", "Requests", "Output", "People"})
"""The groups of settings that clients may change."""


def _may_change(name: str) -> bool:
    return details_of(name).group in CHANGEABLE and name not in SECRETS
