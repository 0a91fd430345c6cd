"""Routes for downloads of models."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter
from fastapi import Path as InPath

from safelight.assembly.services import Services
from safelight.downloads.sources import RepositoryChoice
from safelight.server import auth
from safelight.server.apis.native_fields import CancelledModel, Downloading, DownloadModel
from safelight.server.problems import RefusedError, documented, found
from safelight.settings import Settings

DownloadId = Annotated[str, InPath(pattern="^[0-9a-f]{32}$", description="a download's identifier")]


def may_download(settings: Settings) -> bool:
    """Whether clients may let the server download."""
    return auth.is_loopback(settings.host) if settings.allow_downloads is None else settings.allow_downloads


class DownloadRoutes:
    """The routes for downloads."""

    def __init__(self, control: Services) -> None:
        self._control, self._downloads = control, control.downloads

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.post("/downloads", tags=["models"], status_code=202, responses=documented())(self.begin)
        api.get("/downloads", tags=["models"])(self.all)
        api.get("/downloads/{download_id}", tags=["models"], responses=documented(404))(self.one)
        api.post("/downloads/{download_id}/cancel", tags=["models"], responses=documented(404))(self.cancel)

    def begin(self, asked: Downloading) -> DownloadModel:
        """Download a model, and add it to the library. The answer comes at once; events tell how far it is.

        The setting ``allow_downloads`` must be true.
        """
        if not may_download(self._control.settings):
            message = "clients may not let this server download; the setting allow_downloads allows it"
            raise RefusedError(403, "forbidden", message, "source")
        choice = RepositoryChoice(asked.file, asked.file_variant, asked.revision)
        begun = self._downloads.begin(asked.source, choice, asked.name, asked.variant)
        return DownloadModel(**asdict(begun))

    def all(self) -> list[DownloadModel]:
        """List the downloads, the newest first."""
        return [DownloadModel(**asdict(one)) for one in self._downloads.all()]

    def one(self, download_id: DownloadId) -> DownloadModel:
        """Return how far a download is."""
        return DownloadModel(**asdict(found(self._downloads.find(download_id), "download", download_id)))

    def cancel(self, download_id: DownloadId) -> CancelledModel:
        """Stop a download. What has arrived is kept, so that the same source goes on there."""
        found(self._downloads.find(download_id), "download", download_id)
        return CancelledModel(cancelled=self._downloads.cancel(download_id))
