"""Routes for presets: fields of requests that people saved under names."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Path as InPath
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.responses import Response

from safelight.assembly.services import Services
from safelight.queue.events import Event
from safelight.server.access import Who
from safelight.server.apis.native_fields import Generation
from safelight.server.problems import RefusedError, documented

Name = Annotated[str, InPath(min_length=1, max_length=100, pattern=r"^[^/]*\S[^/]*$", description="a preset's name")]


MOST_CHARACTERS = 65_536
"""Characters of a preset's JSON. A list of presets has all of them."""


class Preset(BaseModel):
    """Fields of a request. What is left out stays as it is when the preset is used."""

    model_config = ConfigDict(extra="forbid")

    fields: dict[str, Any]


class PresetRoutes:
    """The routes for presets."""

    def __init__(self, control: Services) -> None:
        self._control, self._presets = control, control.database.presets

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.get("/presets", tags=["jobs"])(self.all)
        api.put("/presets/{name}", tags=["jobs"], responses=documented())(self.store)
        api.delete("/presets/{name}", tags=["jobs"], status_code=204, responses=documented(404))(self.delete)

    def all(self, who: Who) -> dict[str, Preset]:
        """List one's presets by name."""
        return {name: Preset(fields=fields) for name, fields in self._presets.of(who).all().items()}

    def store(self, name: Name, asked: Preset, who: Who) -> Preset:
        """Store a preset, in place of one with this name."""
        try:
            # The prompt is only there because a request needs one.
            Generation.model_validate({"prompt": "", **asked.fields})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise RefusedError(422, "invalid_request", f"{where}: {first['msg']}", "fields") from error
        if (characters := len(json.dumps(asked.fields))) > MOST_CHARACTERS:
            message = f"this preset has {characters} characters, and at most {MOST_CHARACTERS} are stored"
            raise RefusedError(422, "invalid_request", f"{message}; leave input images out", "fields")
        self._presets.of(who).store(name, asked.fields)
        self._control.events.tell(Event("presets", "", person=who.name))
        return asked

    def delete(self, name: Name, who: Who) -> Response:
        """Delete a preset."""
        if not self._presets.of(who).delete(name):
            raise RefusedError(404, "not_found", f"there is no preset {name}")
        self._control.events.tell(Event("presets", "", person=who.name))
        return Response(status_code=204)
