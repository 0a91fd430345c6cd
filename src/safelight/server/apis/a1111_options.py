"""Routes for A1111's options, and what a client's options select."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi import Request as HTTPRequest

from safelight.assembly.services import Services
from safelight.catalog.cards import Card
from safelight.catalog.model import Model
from safelight.errors import RequestError
from safelight.server import intake
from safelight.server.apis.a1111_fields import OPTIONS_DONE
from safelight.server.apis.a1111_neutral import OPTIONS, refuse
from safelight.server.apis.a1111_titles import by_title, title_of
from safelight.server.clients import CHECKPOINT, Client, Clients, client_of
from safelight.weights.adapter_file import VAE

OWN_VAE = ("Automatic", "None")
"""A1111's names for a checkpoint's own VAE."""


class OptionRoutes:
    """The routes for options."""

    def __init__(self, control: Services, clients: Clients) -> None:
        self._control, self._clients = control, clients

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.get("/options")(self.options)
        api.post("/options")(self.set_options)

    def options(self, http: HTTPRequest) -> dict[str, Any]:
        """Return this client's options."""
        client = client_of(http)
        own = {name: self._clients.option(client, name) for name in ("sd_vae", "CLIP_stop_at_last_layers")}
        options = _options(_current(self._control, self._clients, client))
        return options | {name: value for name, value in own.items() if value is not None}

    def set_options(self, given: dict[str, Any], http: HTTPRequest) -> dict[str, Any]:
        """Set options for this client only. If one of them is not supported, answer with an error and set none."""
        client = client_of(http)
        if "sd_model_checkpoint" in given:
            model = intake.default_card(self._control)
        else:
            model = _current(self._control, self._clients, client)
        known = _options(model)
        for name, value in given.items():
            if name not in OPTIONS_DONE and known.get(name) != value:
                refuse(OPTIONS, "", name, value)
        self._clients.set(client, self._read(given))
        return {}

    def _read(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the supported options, checked. Raises RequestError when a value is not valid."""
        read: dict[str, Any] = {}
        if given.get("sd_model_checkpoint"):
            read["sd_model_checkpoint"] = title_of(by_title(self._control, str(given["sd_model_checkpoint"])))
        if given.get("sd_vae"):
            vae = str(given["sd_vae"])
            read["sd_vae"] = vae if vae in OWN_VAE else self._vae(vae)
        if (layers := stop_at(given)) is not None:
            read["CLIP_stop_at_last_layers"] = layers
        return read

    def _vae(self, name: str) -> str:
        found = self._control.catalog.adapters.get(name)
        if found.kind != VAE:
            raise RequestError("sd_vae", name, f"is a {found.kind}, not a VAE")
        return found.name


def current_model(control: Services, clients: Clients, client: Client) -> Model:
    """Return the model that the client's option selects, or else the default model."""
    chosen = clients.option(client, CHECKPOINT)
    return intake.default_model(control) if chosen is None else by_title(control, chosen)


def _current(control: Services, clients: Clients, client: Client) -> Model | Card:
    """Return the same model. One that was imported and has not been read yet is not read for its title."""
    chosen = clients.option(client, CHECKPOINT)
    return intake.default_card(control) if chosen is None else by_title(control, chosen)


def stop_at(options: dict[str, Any]) -> int | None:
    """Return ``CLIP_stop_at_last_layers``, None if it is not set. Raises RequestError if it is not from 1 to 12."""
    layers = options.get("CLIP_stop_at_last_layers")
    if layers is None:
        return None
    if isinstance(layers, bool) or not isinstance(layers, int | float) or layers not in range(1, 13):
        raise RequestError("CLIP_stop_at_last_layers", layers, "must be a whole number from 1 to 12")
    return int(layers)


def _options(model: Model | Card) -> dict[str, Any]:
    return {
        "sd_model_checkpoint": title_of(model),
        "sd_checkpoint_hash": model.digest,
        "sd_vae": "Automatic",
        "CLIP_stop_at_last_layers": 1,
        "samples_format": "png",
        "eta_noise_seed_delta": 0,
    }
