"""Safelight's own API under ``/api/v1``. Each file ``native_*.py`` has the routes of one subject."""

from __future__ import annotations

from fastapi import APIRouter

from safelight.assembly.services import Services
from safelight.server.apis.native_boards import BoardRoutes
from safelight.server.apis.native_catalogue import CatalogueRoutes
from safelight.server.apis.native_doctor import DoctorRoutes
from safelight.server.apis.native_downloads import DownloadRoutes
from safelight.server.apis.native_estimate import EstimateRoutes
from safelight.server.apis.native_grid import GridRoutes
from safelight.server.apis.native_health import HealthRoutes
from safelight.server.apis.native_images import ImageRoutes
from safelight.server.apis.native_inputs import InputRoutes
from safelight.server.apis.native_jobs import JobRoutes
from safelight.server.apis.native_memory import MemoryRoutes
from safelight.server.apis.native_models import ModelRoutes
from safelight.server.apis.native_options import FieldRoutes
from safelight.server.apis.native_people import PeopleRoutes
from safelight.server.apis.native_pictures import PictureRoutes
from safelight.server.apis.native_presets import PresetRoutes
from safelight.server.apis.native_previews import PreviewRoutes
from safelight.server.apis.native_settings import SettingRoutes
from safelight.server.apis.native_slots import SlotRoutes
from safelight.server.apis.native_versions import VersionRoutes
from safelight.server.problems import documented

ROUTES = (
    *(JobRoutes, InputRoutes, EstimateRoutes, GridRoutes, FieldRoutes, PresetRoutes),
    *(ImageRoutes, BoardRoutes, PictureRoutes),
    *(ModelRoutes, PreviewRoutes, VersionRoutes, CatalogueRoutes, DownloadRoutes, MemoryRoutes),
    *(PeopleRoutes, SlotRoutes, DoctorRoutes, SettingRoutes, HealthRoutes),
)


def router(control: Services) -> APIRouter:
    """Return the router with the routes of Safelight's own API."""
    api = APIRouter(prefix="/api/v1", responses=documented())
    for routes in ROUTES:
        routes(control).add_to(api)
    return api
