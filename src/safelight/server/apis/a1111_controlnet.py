"""Routes of A1111's ControlNet extension, under ``/controlnet``."""

from __future__ import annotations

from fastapi import APIRouter

from safelight.assembly.services import Services
from safelight.families.family import CONTROLNET
from safelight.request.adapters import PREPROCESSORS


class ControlNetRoutes:
    """The routes for ControlNets."""

    def __init__(self, control: Services) -> None:
        self._control = control

    def add_to(self, outside: APIRouter) -> None:
        """Add the routes. ``outside``: the router of the paths that A1111 has outside ``/sdapi/v1``."""
        outside.get("/controlnet/model_list", tags=["AUTOMATIC1111"])(self.controlnets)
        outside.get("/controlnet/module_list", tags=["AUTOMATIC1111"])(self.preprocessors)
        outside.get("/controlnet/version", tags=["AUTOMATIC1111"])(self.version)

    def controlnets(self) -> dict[str, list[str]]:
        """List the ControlNets by name and hash, as the ControlNet extension does."""
        cards = [card for card in self._control.catalog.adapters.cards() if card.kind == CONTROLNET]
        return {"model_list": [f"{card.name} [{card.digest[:8]}]" for card in cards]}

    def preprocessors(self) -> dict[str, list[str]]:
        """List the preprocessors, as the ControlNet extension does."""
        return {"module_list": list(PREPROCESSORS)}

    def version(self) -> dict[str, int]:
        """Return the version of the ControlNet extension whose fields of a unit Safelight reads: 2."""
        return {"version": 2}
