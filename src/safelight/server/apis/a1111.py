"""AUTOMATIC1111's API under ``/sdapi/v1``. A field that Safelight does not support is an error; none is ignored.

The options that one client sets, such as ``sd_model_checkpoint``, hold for that client only: see
:mod:`safelight.server.clients`.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import time
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from PIL import Image as PILImage
from pydantic import BaseModel

from safelight.assembly.services import Services
from safelight.catalog.index import Card
from safelight.catalog.inputs import FORMATS
from safelight.catalog.model import Model
from safelight.errors import RequestError, WorkerDiedError
from safelight.families.family import CONTROLNET
from safelight.pictures import infotext
from safelight.pictures.chunks import parameters, schedule_label
from safelight.queue.image_files import preview_png
from safelight.queue.job import QueuedJob
from safelight.request.parts import PREPROCESSORS
from safelight.request.samplers import SAMPLERS, SCHEDULE_LABELS, a1111_name
from safelight.request.schema import MOST_PIXELS, UPSCALERS, Request
from safelight.server import auth, bridge, intake
from safelight.server.apis.a1111_fields import (
    AUTOMATIC,
    OPTIONS_DONE,
    ImageToImage,
    TextToImage,
    refuse_unknown,
    sampler_of,
)
from safelight.server.apis.a1111_neutral import OPTIONS, refuse
from safelight.server.clients import CHECKPOINT, Client, Clients, client_of
from safelight.server.problems import RefusedError, of_job
from safelight.weights.adapter_file import INVERSION, VAE
from safelight.weights.adapter_kinds import WEIGHTS
from safelight.workers.dispatcher import RunningJob

OWN_VAE = ("Automatic", "None")
"""A1111's names for a checkpoint's own VAE."""


class GenerationAnswer(BaseModel):
    """The finished images. ``images``: PNG files in base64; ``info``: JSON as text."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


class Base64Image(BaseModel):
    """A PNG in base64, with or without ``data:image/png;base64,``."""

    image: str


class PngInfo(BaseModel):
    """The metadata of an image. ``info``: the text in the image file."""

    info: str
    items: dict[str, Any]
    parameters: dict[str, Any]


class A1111Error(BaseModel):
    """An error in A1111's form."""

    error: str
    detail: str
    body: str
    errors: str


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": A1111Error, "description": "an error in AUTOMATIC1111's form"}
    for status in (400, 401, 403, 404, 409, 413, 422, 429, 500, 503, 507)
}


def router(control: Services) -> APIRouter:  # noqa: PLR0915 - a list of routes
    """Return the router with A1111's routes."""
    api = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"], responses=ERRORS)
    outside = APIRouter(tags=["AUTOMATIC1111"])
    clients = Clients()
    siblings: dict[str, list[str]] = {}
    """For each job all jobs of its request. A request has several if its prompt contains choices."""

    def current(client: Client) -> Model:
        chosen = clients.option(client, CHECKPOINT)
        return intake.default_model(control) if chosen is None else by_title(control, chosen)

    def listed(*kinds: str) -> list[Card]:
        return [found for found in control.catalog.adapters.cards() if found.kind in kinds]

    def _vae(name: str) -> str:
        found = control.catalog.adapters.get(name)
        if found.kind != VAE:
            raise RequestError("sd_vae", name, f"is a {found.kind}, not a VAE")
        return found.name

    @api.post("/txt2img")
    async def txt2img(asked: TextToImage, http: HTTPRequest) -> GenerationAnswer:
        """Make images and return them."""
        return await make_images(asked, http)

    @api.post("/img2img")
    async def img2img(asked: ImageToImage, http: HTTPRequest) -> GenerationAnswer:
        """Make images from an image, or redraw its masked part, and return them."""
        return await make_images(asked, http)

    async def make_images(asked: TextToImage, http: HTTPRequest) -> GenerationAnswer:
        jobs = await bridge.run(queue_jobs, asked, client_of(http))
        siblings.update({job.id: [sibling.id for sibling in jobs] for job in jobs})
        try:
            jobs = await intake.all_ended(control, jobs, http)
        finally:
            for job in jobs:
                siblings.pop(job.id, None)
        return await bridge.run(_answer, control, jobs, asked)

    def queue_jobs(asked: TextToImage, client: Client) -> list[QueuedJob]:
        refuse_unknown(asked)
        override = asked.override_settings or {}
        wanted = override.get("sd_model_checkpoint")
        model = by_title(control, str(wanted)) if wanted else current(client)
        mark = override.get("sd_checkpoint_hash")
        if mark and not model.digest.startswith(str(mark)):
            message = f"the model {model.name} has the hash {model.digest[:10]}, not {mark}"
            raise RefusedError(409, "which_model", message, "sd_checkpoint_hash")
        sampler, schedule = sampler_of(asked.sampler_name or asked.sampler_index or "Euler", asked.scheduler)
        count = asked.batch_size * asked.n_iter
        seed = asked.seed if asked.seed is not None and asked.seed >= 0 else intake.some_seed(count)
        strength = asked.subseed_strength or 0.0
        subseed = asked.subseed if asked.subseed is not None and asked.subseed >= 0 else intake.some_seed(count)
        vae = override.get("sd_vae") or clients.option(client, "sd_vae") or OWN_VAE[0]
        skip = _layers(asked, override) or clients.option(client, "CLIP_stop_at_last_layers") or 1
        if not model.family.clip_skip_in_a1111:
            # A1111 ignores this option for some families, such as SDXL.
            skip = 1
        request = Request(
            prompt=asked.prompt,
            model=model.name,
            negative=asked.negative_prompt or "",
            seed=seed,
            steps=asked.steps if asked.steps is not None else 50,
            width=asked.width or 512,
            height=asked.height or 512,
            cfg=asked.cfg_scale if asked.cfg_scale is not None else 7.0,
            sampler=sampler,
            schedule=schedule,
            count=count,
            clip_skip=skip - 1,
            vae="" if vae in OWN_VAE else str(vae),
            variation_seed=subseed if strength else 0,
            variation_strength=strength,
            **asked.given(),
        )
        return intake.accept(control, request, client=f"a1111 {client.address}")

    @api.get("/sd-models")
    def sd_models() -> list[dict[str, Any]]:
        return [_listed(card) for card in control.library.cards()]

    @api.get("/samplers")
    def samplers() -> list[dict[str, Any]]:
        return [{"name": s.a1111, "aliases": [name], "options": {}} for name, s in SAMPLERS.usable()]

    @api.get("/schedulers")
    def schedulers() -> list[dict[str, Any]]:
        more = {"aliases": None, "default_rho": -1, "need_inner_model": False}
        labels = (AUTOMATIC, *SCHEDULE_LABELS.values())
        return [{"name": label.lower().replace(" ", "_"), "label": label, **more} for label in labels]

    @api.get("/upscalers")
    def upscalers() -> list[dict[str, Any]]:
        more = {"model_name": None, "model_path": None, "model_url": None, "scale": None}
        pixels = [theirs for ours, theirs in UPSCALERS.items() if not ours.startswith("latent")]
        return [{"name": name, **more} for name in ("None", *pixels)]

    @api.get("/latent-upscale-modes")
    def latent_upscale_modes() -> list[dict[str, Any]]:
        return [{"name": theirs} for ours, theirs in UPSCALERS.items() if ours.startswith("latent")]

    @api.get("/sd-vae")
    def sd_vae() -> list[dict[str, Any]]:
        """List the VAEs, the values of the option ``sd_vae``."""
        return [{"model_name": found.name, "filename": found.path.name} for found in listed(VAE)]

    @api.get("/hypernetworks")
    @api.get("/prompt-styles")
    @api.get("/face-restorers")
    @api.get("/realesrgan-models")
    def none_yet() -> list[dict[str, Any]]:
        """Return an empty list: Safelight has none of these."""
        return []

    @api.get("/loras")
    def loras() -> list[dict[str, Any]]:
        """List the LoRAs and their relatives, for ``<lora:name:strength>`` in a prompt."""
        return [
            {
                "name": found.name,
                "alias": found.name,
                "path": found.path.name,
                "metadata": {**found.summary, "path": found.path.name},
            }
            for found in listed(*WEIGHTS)
        ]

    @api.get("/embeddings")
    def embeddings() -> dict[str, dict[str, Any]]:
        """List the textual inversions, whose names are words of a prompt."""
        return {"loaded": {found.name: _embedding(found) for found in listed(INVERSION)}, "skipped": {}}

    @api.get("/scripts")
    def scripts() -> dict[str, list[str]]:
        return {"txt2img": ["controlnet"], "img2img": ["controlnet"]}

    @outside.get("/controlnet/model_list", tags=["AUTOMATIC1111"])
    def controlnets() -> dict[str, list[str]]:
        """List the ControlNets by name and hash, as the ControlNet extension does."""
        return {"model_list": [f"{found.name} [{found.digest[:8]}]" for found in listed(CONTROLNET)]}

    @outside.get("/controlnet/module_list", tags=["AUTOMATIC1111"])
    def preprocessors() -> dict[str, list[str]]:
        """List the preprocessors, as the ControlNet extension does."""
        return {"module_list": list(PREPROCESSORS)}

    @outside.get("/controlnet/version", tags=["AUTOMATIC1111"])
    def version() -> dict[str, int]:
        """Return the version of the ControlNet extension whose fields of a unit Safelight reads: 2."""
        return {"version": 2}

    @api.get("/options")
    def options(http: HTTPRequest) -> dict[str, Any]:
        client = client_of(http)
        own = {name: clients.option(client, name) for name in ("sd_vae", "CLIP_stop_at_last_layers")}
        return _options(current(client)) | {name: value for name, value in own.items() if value is not None}

    @api.post("/options")
    def set_options(given: dict[str, Any], http: HTTPRequest) -> dict[str, Any]:
        """Set options for this client only. If one of them is not supported, answer with an error and set none."""
        client = client_of(http)
        known = _options(current(client) if "sd_model_checkpoint" not in given else intake.default_model(control))
        for name, value in given.items():
            if name not in OPTIONS_DONE and known.get(name) != value:
                refuse(OPTIONS, "", name, value)
        taken: dict[str, Any] = {}
        if given.get("sd_model_checkpoint"):
            taken["sd_model_checkpoint"] = _title(by_title(control, str(given["sd_model_checkpoint"])))
        if given.get("sd_vae"):
            vae = str(given["sd_vae"])
            taken["sd_vae"] = vae if vae in OWN_VAE else _vae(vae)
        if (skip := _stop_at(given)) is not None:
            taken["CLIP_stop_at_last_layers"] = skip
        clients.set(client, taken)
        return {}

    @api.get("/progress")
    def progress(skip_current_image: bool = False) -> dict[str, Any]:
        """Return the progress of the running job, whichever client sent it."""
        return _progress(control.dispatcher.state, skip_current_image)

    @api.post("/interrupt")
    def interrupt(http: HTTPRequest) -> dict[str, Any]:
        """Cancel all jobs of the running request, if it came from this address."""
        job = own_job(http)
        for each in siblings.get(job.id, [job.id]) if job is not None else ():
            control.dispatcher.cancel(each)
        return {}

    @api.post("/skip")
    def skip(http: HTTPRequest) -> dict[str, Any]:
        """Cancel the running job, if it came from this address."""
        job = own_job(http)
        if job is not None:
            control.dispatcher.cancel(job.id)
        return {}

    def own_job(http: HTTPRequest) -> QueuedJob | None:
        state = control.dispatcher.state
        if state is None or state.job.client != f"a1111 {client_of(http).address}":
            return None
        return state.job

    @api.post("/refresh-checkpoints")
    @api.post("/refresh-loras")
    def refresh() -> dict[str, Any]:
        """Do nothing: the lists are always up to date."""
        return {}

    @api.post("/png-info")
    def png_info(picture: Base64Image) -> PngInfo:
        try:
            data = base64.b64decode(picture.image.rpartition(",")[2], validate=True)
            with PILImage.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise RefusedError(422, "invalid_request", f"image: has more than {MOST_PIXELS} pixels", "image")
                text, items = infotext.read(image)
        except (binascii.Error, OSError, SyntaxError, ValueError, PILImage.DecompressionBombError) as error:
            raise RefusedError(422, "invalid_request", f"image: cannot be read ({error})", "image") from error
        return PngInfo(info=text, items=items, parameters=infotext.fields(text))

    @api.get("/cmd-flags")
    def cmd_flags() -> dict[str, Any]:
        return {"api": True, "listen": not auth.is_loopback(control.settings.host), "port": control.settings.port}

    @api.get("/memory")
    def memory() -> dict[str, Any]:
        """Return the memory in A1111's form. Sizes are in bytes."""
        try:
            places = control.supervisor.ask("memory").result(30)["places"]
        except (WorkerDiedError, TimeoutError, RuntimeError) as error:
            raise RefusedError(503, "worker_not_ready", str(error)) from error
        sizes = {
            place: {"free": v["budget"] - v["stored"] - v["promised"], "used": v["stored"], "total": v["budget"]}
            for place, v in places.items()
        }
        host = sizes.pop("host")
        return {"ram": host, "cuda": next(iter(sizes.values()), {"error": "unavailable"})}

    @outside.get("/internal/ping", tags=["AUTOMATIC1111"])
    def ping() -> dict[str, Any]:
        return {}

    routes = APIRouter()
    routes.include_router(api)
    routes.include_router(outside)
    return routes


def by_title(control: Services, title: str) -> Model:
    """Return the model with this A1111 title (``name [hash]``), name, file name or hash.

    Raises ModelNotFoundError when there is none.
    Raises RefusedError when the title has another model's hash, or several models have this file name.
    """
    name, _, mark = title.removesuffix("]").rpartition(" [") if title.endswith("]") else (title, "", "")
    named = control.library.find_named(name)
    if named is not None:
        if not named.digest.startswith(mark):
            message = f"the model {name} now has the hash {named.digest[:10]}, not {mark}"
            raise RefusedError(409, "which_model", message, "sd_model_checkpoint")
        return named
    cards = control.library.cards()
    found = [card for card in cards if name in (card.digest, card.digest[:10], card.path.name, card.stem)]
    if len(found) > 1:
        names = ", ".join(card.name for card in found)
        raise RefusedError(409, "which_model", f"{name} can be {names}; send the model's name", "sd_model_checkpoint")
    return intake.model_named(control, found[0].name if found else name)


def _layers(asked: TextToImage, override: dict[str, Any]) -> int | None:
    """Return the text encoder's last layer: A1111's option, or else SD.Next's field; SillyTavern sends both."""
    option = _stop_at(override)
    if option is None:
        return asked.clip_skip
    if asked.clip_skip not in (None, 1, option):
        raise RequestError("clip_skip", asked.clip_skip, f"differs from CLIP_stop_at_last_layers, {option}")
    return option


def _stop_at(options: dict[str, Any]) -> int | None:
    """Return ``CLIP_stop_at_last_layers``, None if it is not set. Raises RequestError if it is not from 1 to 12."""
    skip = options.get("CLIP_stop_at_last_layers")
    if skip is None:
        return None
    if isinstance(skip, bool) or not isinstance(skip, int | float) or skip not in range(1, 13):
        raise RequestError("CLIP_stop_at_last_layers", skip, "must be a whole number from 1 to 12")
    return int(skip)


def _title(model: Model | Card) -> str:
    return f"{model.name} [{model.digest[:10]}]"


def _listed(model: Card) -> dict[str, Any]:
    return {
        "title": _title(model),
        "model_name": model.name,
        "hash": model.digest[:10],
        "sha256": model.digest,
        "filename": model.path.name,
        "config": None,
    }


def _options(model: Model) -> dict[str, Any]:
    return {
        "sd_model_checkpoint": _title(model),
        "sd_checkpoint_hash": model.digest,
        "sd_vae": "Automatic",
        "CLIP_stop_at_last_layers": 1,
        "samples_format": "png",
        "eta_noise_seed_delta": 0,
    }


def _progress(state: RunningJob | None, skip_image: bool) -> dict[str, Any]:
    empty = {"skipped": False, "interrupted": False, "stopping_generation": False, "job": "", "job_count": 0}
    steps = {"job_timestamp": "0", "job_no": 0, "sampling_step": 0, "sampling_steps": 0}
    if state is None or state.progress is None:
        return {
            "progress": 0.0,
            "eta_relative": 0.0,
            "state": {**empty, **steps},
            "current_image": None,
            "textinfo": None,
        }
    job, now = state.job, state.progress
    # The worker knows how many steps the model computes; without a model, the request only tells the usual number.
    steps = now.steps if now.stage == "denoise" else job.request.steps_done
    done = now.image * steps + (now.step if now.stage == "denoise" else 0)
    done += steps if now.stage == "decode" else 0
    share = done / (steps * job.request.count)
    spent = time.time() - state.since
    stamp = time.strftime("%Y%m%d%H%M%S", time.localtime(state.since))
    count = {"job": job.id, "job_count": job.request.count, "job_timestamp": stamp, "job_no": now.image}
    at = {"sampling_step": now.step if now.stage == "denoise" else 0, "sampling_steps": steps}
    preview = now.preview if not skip_image else None
    picture = None
    if preview is not None:
        picture = base64.b64encode(preview_png(preview)).decode()
    return {
        "progress": min(share, 0.99),
        "eta_relative": spent / share - spent if share else 0.0,
        "state": {**empty, **count, **at},
        "current_image": picture,
        "textinfo": now.stage,
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


def _answer(control: Services, jobs: list[QueuedJob], asked: TextToImage) -> GenerationAnswer:
    job = next((job for job in jobs if job.state == "failed"), jobs[0])
    if job.state == "failed":
        raise of_job(job)
    images = [image for one in jobs for image in control.database.images(1000, job=one.id)]
    request = job.request
    texts = [parameters(image.metadata) for image in images]
    seeds = [image.seed for image in images]
    requests = [image.metadata["request"] for image in images]
    subseeds = [each["variation_seed"] if each["variation_strength"] else each["seed"] for each in requests]
    info = {
        "prompt": request.prompt,
        "all_prompts": [each["prompt"] for each in requests],
        "negative_prompt": request.negative,
        "all_negative_prompts": [each["negative"] for each in requests],
        "seed": request.seed,
        "all_seeds": seeds,
        "subseed": subseeds[0] if subseeds else request.seed,
        "all_subseeds": subseeds,
        "subseed_strength": request.variation_strength,
        "width": request.width,
        "height": request.height,
        "sampler_name": a1111_name(request.sampler),
        "cfg_scale": request.cfg,
        "steps": request.steps,
        "batch_size": asked.batch_size,
        "sd_model_name": request.model,
        "sd_model_hash": job.model_digest[:10],
        "clip_skip": request.clip_skip + 1,
        "infotexts": texts,
        "extra_generation_params": {"Schedule type": schedule_label(request.sampler, request.schedule)},
        "index_of_first_image": 0,
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(job.created)),
        "is_using_inpainting_conditioning": False,
        "interrupted": any(job.state == "cancelled" for job in jobs),
    }
    encoded = [base64.b64encode(control.gallery.path(image.file).read_bytes()).decode() for image in images]
    left_out = {"init_images", "mask"} if not getattr(asked, "include_init_images", True) else set[str]()
    # These contain the pictures of ControlNets, which A1111 does not send back either.
    given = asked.model_dump(exclude=left_out | {"alwayson_scripts"})
    return GenerationAnswer(images=encoded if asked.send_images else [], parameters=given, info=json.dumps(info))
