"""Routes that go back, and that make a model smaller: earlier contents of a model, compact files, earlier versions of
Safelight."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter
from fastapi import Path as InPath
from pydantic import BaseModel, ConfigDict
from pydantic import Field as FieldOf

from safelight.assembly.command_run import CommandState
from safelight.assembly.services import Services
from safelight.diagnostics.environment import Environment, Environments
from safelight.errors import RequestError
from safelight.files.blocks import COMPACT_FORMS, compact_file_name
from safelight.queue.events import Event
from safelight.server import bridge
from safelight.server.apis.native_fields import ModelModel
from safelight.server.apis.native_models import ModelRoutes
from safelight.server.problems import RefusedError, documented


class CompactAsked(BaseModel):
    """``form``: the format of the new file, by a name that ``safelight models compact --help`` lists."""

    model_config = ConfigDict(extra="forbid")

    form: str


class EarlierModel(BaseModel):
    """A content that a model had before. ``bytes``: the size of its weights."""

    digest: str
    path: str
    bytes: int


class RollbackAsked(BaseModel):
    """``digest``: the beginning of the digest of an earlier content; the newest one if it is empty."""

    model_config = ConfigDict(extra="forbid")

    digest: Annotated[str, FieldOf(pattern="^[0-9a-f]{0,64}$")] = ""


class EnvironmentModel(BaseModel):
    """A version of Safelight that ``safelight upgrade`` installed.

    ``made``: in seconds since 1970; 0 for the first. ``versions``: of the packages that decide about images.
    ``active``: whether the next start of the server uses it. ``running``: whether this server runs in it.
    """

    name: str
    made: float
    versions: dict[str, str]
    active: bool
    running: bool


class VersionRoutes:
    """The routes for earlier contents of models, compact files, and versions of Safelight."""

    def __init__(self, control: Services) -> None:
        self._control, self._library = control, control.library
        self._models = ModelRoutes(control)
        self._environments = Environments()

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.get("/compacting", tags=["models"])(self.compacting)
        api.post("/models/{name}/compact", tags=["models"], status_code=202, responses=documented(404))(self.compact)
        api.get("/models/{name}/earlier", tags=["models"], responses=documented(404))(self.earlier)
        api.post("/models/{name}/rollback", tags=["models"], responses=documented(404, 409))(self.roll_back)
        api.get("/versions", tags=["server"])(self.versions)
        api.post("/versions/{version}/activate", tags=["server"], responses=documented(404))(self.activate)

    def compacting(self) -> CommandState:
        """Return what is known of the last compact file since the server started."""
        return self._control.compacting.state

    def compact(self, name: str, asked: CompactAsked) -> CommandState:
        """Write a model's denoiser quantised, as ``safelight models compact`` does, and add the file as a new model.

        The file is written into the folder for downloads. It takes minutes; the event ``compacting`` tells the end.
        """
        if asked.form not in COMPACT_FORMS:
            raise RequestError("form", asked.form, f"must be one of {', '.join(COMPACT_FORMS)}")
        card = self._control.catalog.model_card(name)
        settings = self._control.settings
        folder = settings.download_folder or settings.root / "downloads"
        folder.mkdir(parents=True, exist_ok=True)
        out = folder / compact_file_name(card.name, asked.form)
        about = {"model": card.name, "form": asked.form, "file": out.name}
        arguments = ("models", "compact", card.name, "--form", asked.form, "--out", str(out))
        return self._control.compacting.start(*arguments, about=about)

    def earlier(self, name: str) -> list[EarlierModel]:
        """List the contents that a model had before, the newest first."""
        card = self._control.catalog.model_card(name)
        return [
            EarlierModel(digest=one.digest, path=one.path.name, bytes=one.summary()["bytes"])
            for one in self._library.earlier(card.name)
        ]

    async def roll_back(self, name: str, asked: RollbackAsked) -> ModelModel:
        """Make a name stand for its earlier content again. All its bytes are read."""
        card = await bridge.run(self._control.catalog.model_card, name)
        await bridge.long(self._library.roll_back, card.name, asked.digest)
        self._control.events.tell(Event("models", ""))
        return await bridge.run(self._models.one_model, card.name)

    def versions(self) -> list[EnvironmentModel]:
        """List the installed versions of Safelight, the oldest first."""
        active = self._environments.active().name
        return [self._describe(one, active) for one in self._environments.all()]

    def activate(self, version: Annotated[str, InPath(description="the name of an environment")]) -> EnvironmentModel:
        """Use a version from the next start of the server on, as ``safelight rollback`` does."""
        found = next((one for one in self._environments.all() if one.name == version), None)
        if found is None:
            raise RefusedError(404, "not_found", f"there is no version {version!r}")
        self._environments.activate(found)
        return self._describe(found, found.name)

    def _describe(self, one: Environment, active: str) -> EnvironmentModel:
        return EnvironmentModel(
            name=one.name,
            made=one.when,
            versions=one.shown_versions,
            active=one.name == active,
            running=one.prefix.resolve() == Path(sys.prefix).resolve(),
        )
