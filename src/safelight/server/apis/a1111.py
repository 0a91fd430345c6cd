"""AUTOMATIC1111's API under ``/sdapi/v1``. A field that Safelight does not support is an error; none is ignored.

Each file ``a1111_*.py`` has the routes of one subject. The options that one client sets, such as
``sd_model_checkpoint``, hold for that client only: see :mod:`safelight.server.clients`.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel

from safelight.assembly.services import Services
from safelight.server.apis import a1111_values
from safelight.server.apis.a1111_controlnet import ControlNetRoutes
from safelight.server.apis.a1111_extras import ExtrasRoutes
from safelight.server.apis.a1111_generation import GenerationRoutes
from safelight.server.apis.a1111_library import LibraryRoutes
from safelight.server.apis.a1111_options import OptionRoutes
from safelight.server.apis.a1111_png_info import png_info
from safelight.server.apis.a1111_progress import ProgressRoutes, RunningRequests
from safelight.server.apis.a1111_server import ServerRoutes
from safelight.server.clients import Clients
from safelight.server.problems import response


class A1111Error(BaseModel):
    """An error in A1111's form."""

    error: str
    detail: str
    body: str
    errors: str


ERRORS: dict[int | str, dict[str, Any]] = {
    status: response(A1111Error, "an error in AUTOMATIC1111's form")
    for status in (400, 401, 403, 404, 409, 413, 422, 429, 500, 503, 507)
}


def router(control: Services) -> APIRouter:
    """Return the router with A1111's routes."""
    api = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"], responses=ERRORS)
    outside = APIRouter(tags=["AUTOMATIC1111"])
    clients, requests = Clients(), RunningRequests()
    GenerationRoutes(control, clients, requests).add_to(api)
    ProgressRoutes(control, requests).add_to(api)
    OptionRoutes(control, clients).add_to(api)
    LibraryRoutes(control).add_to(api)
    a1111_values.add_to(api)
    ExtrasRoutes(control).add_to(api)
    api.post("/png-info")(png_info)
    ServerRoutes(control).add_to(api, outside)
    ControlNetRoutes(control).add_to(outside)
    routes = APIRouter()
    routes.include_router(api)
    routes.include_router(outside)
    return routes
