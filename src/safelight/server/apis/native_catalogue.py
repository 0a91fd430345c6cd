"""The route of the catalogue: well-known models that can be downloaded."""

from __future__ import annotations

from typing import Annotated

import psutil
from fastapi import APIRouter, Query
from pydantic import BaseModel

from safelight.assembly.services import Services
from safelight.downloads.catalogue import CatalogueFile, read_catalogue
from safelight.server.apis.native_downloads import may_download


class BundleModel(BaseModel):
    """Files that together make a usable model. ``memory_gb``: in which it works well, estimated from the sizes."""

    name: str
    title: str
    family: str
    memory_gb: int
    files: list[CatalogueFile]


class CatalogueModel(BaseModel):
    """``memory_gb``: of this machine. ``may_download``: whether clients may let this server download."""

    memory_gb: float
    may_download: bool
    bundles: list[BundleModel]


class CatalogueRoutes:
    """The route of the catalogue."""

    def __init__(self, control: Services) -> None:
        self._settings = control.settings

    def add_to(self, api: APIRouter) -> None:
        """Add the route to a router."""
        api.get("/catalogue", tags=["models"])(self.bundles)

    def bundles(
        self,
        family: str = "",
        memory_gb: Annotated[float | None, Query(ge=0, le=1e6, description="only what fits in this memory")] = None,
    ) -> CatalogueModel:
        """List the bundles. ``POST /api/v1/downloads`` takes their names."""
        found = read_catalogue()
        bundles = [
            BundleModel(
                name=one.name,
                title=one.title,
                family=one.family,
                memory_gb=one.memory_gb,
                files=found.find(one.name),
            )
            for one in found.bundles_for(family, memory_gb)
        ]
        return CatalogueModel(
            memory_gb=psutil.virtual_memory().total / 2**30,
            may_download=may_download(self._settings),
            bundles=bundles,
        )
