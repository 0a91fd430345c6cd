"""Routes that list the values which fields of A1111's requests may have: samplers, upscalers and so on."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from safelight.request.samplers import SAMPLERS, SCHEDULE_LABELS
from safelight.request.values import UPSCALERS
from safelight.server.apis.a1111_fields import AUTOMATIC


def add_to(api: APIRouter) -> None:
    """Add the routes to a router."""
    api.get("/samplers")(samplers)
    api.get("/schedulers")(schedulers)
    api.get("/upscalers")(upscalers)
    api.get("/latent-upscale-modes")(latent_upscale_modes)
    api.get("/scripts")(scripts)
    api.get("/script-info")(script_info)
    api.get("/extensions")(extensions)


def samplers() -> list[dict[str, Any]]:
    """List the samplers by AUTOMATIC1111's names. The aliases are Safelight's."""
    return [{"name": s.a1111, "aliases": [name], "options": {}} for name, s in SAMPLERS.usable()]


def schedulers() -> list[dict[str, Any]]:
    """List the noise schedules."""
    more = {"aliases": None, "default_rho": -1, "need_inner_model": False}
    labels = (AUTOMATIC, *SCHEDULE_LABELS.values())
    return [{"name": label.lower().replace(" ", "_"), "label": label, **more} for label in labels]


def upscalers() -> list[dict[str, Any]]:
    """List the upscalers that compute with pixels."""
    more = {"model_name": None, "model_path": None, "model_url": None, "scale": None}
    pixels = [theirs for ours, theirs in UPSCALERS.items() if not ours.startswith("latent")]
    return [{"name": name, **more} for name in ("None", *pixels)]


def latent_upscale_modes() -> list[dict[str, Any]]:
    """List the upscalers that compute with latents."""
    return [{"name": theirs} for ours, theirs in UPSCALERS.items() if ours.startswith("latent")]


def scripts() -> dict[str, list[str]]:
    """List the extensions that requests may use: ControlNet."""
    return {"txt2img": ["controlnet"], "img2img": ["controlnet"]}


def script_info() -> list[dict[str, Any]]:
    """Describe the extensions that requests may use: ControlNet. Its units are objects, so it lists no arguments."""
    return [
        {"name": "controlnet", "is_alwayson": True, "is_img2img": is_img2img, "args": []}
        for is_img2img in (False, True)
    ]


def extensions() -> list[dict[str, Any]]:
    """List the extensions that are installed as packages of their own: none, because ControlNet is built in."""
    return []
