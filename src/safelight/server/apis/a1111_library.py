"""Routes that list the models and adapters of the library in A1111's form."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from safelight.assembly.services import Services
from safelight.catalog.cards import Card
from safelight.server.apis.a1111_titles import title_of
from safelight.weights.adapter_file import INVERSION, VAE
from safelight.weights.adapter_kinds import WEIGHT_ADAPTER_KINDS


class LibraryRoutes:
    """The routes for models and adapters."""

    def __init__(self, control: Services) -> None:
        self._control = control

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.get("/sd-models")(self.sd_models)
        api.get("/sd-vae")(self.sd_vae)
        api.get("/loras")(self.loras)
        api.get("/embeddings")(self.embeddings)
        for path in ("/hypernetworks", "/prompt-styles", "/face-restorers", "/realesrgan-models"):
            api.get(path)(none_yet)
        for path in ("/refresh-checkpoints", "/refresh-loras", "/refresh-vae", "/refresh-embeddings"):
            api.post(path)(refresh)

    def sd_models(self) -> list[dict[str, Any]]:
        """List the models by AUTOMATIC1111's titles."""
        return [_describe(card) for card in self._control.library.cards()]

    def sd_vae(self) -> list[dict[str, Any]]:
        """List the VAEs, the values of the option ``sd_vae``."""
        return [{"model_name": found.name, "filename": found.path.name} for found in self._cards(VAE)]

    def loras(self) -> list[dict[str, Any]]:
        """List the LoRAs and their relatives, for ``<lora:name:strength>`` in a prompt."""
        return [
            {
                "name": found.name,
                "alias": found.name,
                "path": found.path.name,
                "metadata": {**found.summary, "path": found.path.name},
            }
            for found in self._cards(*WEIGHT_ADAPTER_KINDS)
        ]

    def embeddings(self) -> dict[str, dict[str, Any]]:
        """List the textual inversions, whose names are words of a prompt."""
        return {"loaded": {found.name: _embedding(found) for found in self._cards(INVERSION)}, "skipped": {}}

    def _cards(self, *kinds: str) -> list[Card]:
        """Return the cards of the adapters of these kinds."""
        return [card for card in self._control.catalog.adapters.cards() if card.kind in kinds]


def none_yet() -> list[dict[str, Any]]:
    """Return an empty list: Safelight has none of these."""
    return []


def refresh() -> dict[str, Any]:
    """Do nothing: the lists are always up to date."""
    return {}


def _describe(model: Card) -> dict[str, Any]:
    return {
        "title": title_of(model),
        "model_name": model.name,
        "hash": model.digest[:10],
        "sha256": model.digest,
        "filename": model.path.name,
        "config": None,
    }


def _embedding(found: Card) -> dict[str, Any]:
    shapes = list((found.vectors or {}).values())
    return {
        "step": None,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
        "shape": shapes[0][-1],
        "vectors": shapes[0][0] if len(shapes[0]) == 2 else 1,
    }
