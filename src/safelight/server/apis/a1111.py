"""AUTOMATIC1111's API under ``/sdapi/v1``, as its clients speak it; what Safelight cannot do is an error, not ignored.

``sd_model_checkpoint`` set by one client is that client's default and nobody else's: see
:mod:`safelight.server.clients`.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import time
from typing import Any, Literal

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from PIL import Image as PILImage
from PIL import ImageOps
from pydantic import BaseModel, ConfigDict, Field

from safelight.assemble.serving import Control
from safelight.engine.dispatch import State
from safelight.errors import RequestError, WorkerDiedError
from safelight.jobs.job import Job
from safelight.library.inputs import opened
from safelight.library.model import Model
from safelight.metadata.chunks import parameters
from safelight.server import asking, auth, bridge
from safelight.server.clients import Client, Clients, client_of
from safelight.server.problems import RefusedError
from safelight.storage.images import preview_png
from safelight.types import SAMPLERS, Request

SCHEDULES = {
    "automatic": "default",
    "uniform": "default",
    "karras": "karras",
    "exponential": "exponential",
    "sgm uniform": "sgm_uniform",
}
"""A1111's schedule types by ours."""

LABELS = {"default": "Automatic", "karras": "Karras", "exponential": "Exponential", "sgm_uniform": "SGM Uniform"}


class TextToImage(BaseModel):
    """A1111's fields that have a meaning here; others are accepted as long as they ask for nothing."""

    model_config = ConfigDict(extra="allow")

    prompt: str = ""
    negative_prompt: str | None = ""
    seed: int | None = -1
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    batch_size: int = Field(default=1, ge=1)
    n_iter: int = Field(default=1, ge=1)
    steps: int | None = 50
    cfg_scale: float | None = 7.0
    width: int | None = 512
    height: int | None = 512
    override_settings: dict[str, Any] | None = None
    send_images: bool = True


class ImageToImage(TextToImage):
    """``init_images`` and ``mask`` are in base64. What is masked starts from the image itself."""

    init_images: list[str] = Field(min_length=1, max_length=1)
    mask: str | None = None
    denoising_strength: float = Field(default=0.75, gt=0, le=1)
    mask_blur: int | None = Field(default=4, ge=0, le=256)
    inpaint_full_res: bool = True
    inpaint_full_res_padding: int | None = Field(default=0, ge=0, le=4096)
    inpainting_mask_invert: Literal[0, 1] | bool = 0
    inpainting_fill: Literal[0, 1] = 0
    resize_mode: Literal[0] = 0
    include_init_images: bool = False

    def given(self) -> dict[str, Any]:
        """The fields of a request that say what it starts from. Raises RequestError for what is no image."""
        values: dict[str, Any] = {"image": _data(self.init_images[0]), "strength": self.denoising_strength}
        if self.mask:
            mask = _inverted(self.mask) if self.inpainting_mask_invert else _data(self.mask)
            values |= {"mask": mask, "mask_blur": self.mask_blur or 0}
            values["mask_padding"] = (self.inpaint_full_res_padding or 0) if self.inpaint_full_res else None
        return values


def _data(picture: str) -> str:
    return picture if picture.startswith("data:") else f"data:image/png;base64,{picture}"


def _inverted(picture: str) -> str:
    try:
        data = base64.b64decode(picture.rpartition(",")[2], validate=True)
    except ValueError as error:
        raise RequestError("mask", picture[:40], f"is not base64 ({error})") from error
    held = io.BytesIO()
    ImageOps.invert(opened("mask", data).convert("L")).save(held, "PNG")
    return _data(base64.b64encode(held.getvalue()).decode())


NOTHING = (None, False, 0, -1, "", "None", "none", [], {})
"""Values that ask for nothing, whatever the field."""

NEUTRAL: dict[str, tuple[object, ...]] = {
    "eta": (1, 1.0),
    "image_cfg_scale": (1.5,),
    "initial_noise_multiplier": (1, 1.0),
    "mask_round": (True,),
    "s_churn": (),
    "s_tmin": (),
    "s_tmax": (float("inf"), "inf"),
    "s_noise": (1, 1.0),
    "sd_vae": ("Automatic",),
    "samples_format": ("png",),
}
"""Further values that ask for nothing, by field or option."""

WITHOUT_EFFECT = frozenset(
    {
        "comments",
        "clip_skip",
        "denoising_strength",
        "do_not_save_grid",
        "do_not_save_samples",
        "force_task_id",
        "firstphase_height",
        "firstphase_width",
        "hr_cfg",
        "hr_checkpoint_name",
        "hr_negative_prompt",
        "hr_prompt",
        "hr_resize_x",
        "hr_resize_y",
        "hr_sampler_name",
        "hr_scale",
        "hr_scheduler",
        "hr_second_pass_steps",
        "hr_upscaler",
        "override_settings_restore_afterwards",
        "refiner_switch_at",
        "save_images",
        "script_args",
        "subseed",
    }
)
"""Fields that say how to do what other fields ask for, or where A1111 itself keeps its images."""


class Made(BaseModel):
    """``images``: PNG files in base64; ``info``: JSON as text."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


class Picture(BaseModel):
    """A PNG in base64, with or without ``data:image/png;base64,``."""

    image: str


class PngInfo(BaseModel):
    """``info``: the text that the image carries."""

    info: str
    items: dict[str, Any]
    parameters: dict[str, Any]


class A1111Error(BaseModel):
    """A1111's form of an error."""

    error: str
    detail: str
    body: str
    errors: str


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": A1111Error, "description": "an error in AUTOMATIC1111's form"}
    for status in (400, 401, 403, 404, 409, 413, 422, 429, 500, 503)
}


def router(control: Control) -> APIRouter:  # noqa: PLR0915 - a list of routes
    """The routes over a control."""
    api = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"], responses=ERRORS)
    outside = APIRouter(tags=["AUTOMATIC1111"])
    clients = Clients()

    def current(client: Client) -> Model:
        chosen = clients.checkpoint(client)
        return asking.default_model(control) if chosen is None else by_title(control, chosen)

    @api.post("/txt2img")
    async def txt2img(asked: TextToImage, http: HTTPRequest) -> Made:
        """Make images and answer with them."""
        job = await bridge.run(accepted, asked, client_of(http))
        job = await asking.ended(control, job, http)
        return await bridge.run(_made, control, job, asked)

    @api.post("/img2img")
    async def img2img(asked: ImageToImage, http: HTTPRequest) -> Made:
        """Make images from an image, perhaps in a part of it, and answer with them."""
        job = await bridge.run(accepted, asked, client_of(http))
        job = await asking.ended(control, job, http)
        return await bridge.run(_made, control, job, asked)

    def accepted(asked: TextToImage, client: Client) -> Job:
        _refuse(asked)
        override = asked.override_settings or {}
        wanted = override.get("sd_model_checkpoint")
        model = by_title(control, str(wanted)) if wanted else current(client)
        sampler, schedule = sampler_of(asked.sampler_name or asked.sampler_index or "Euler", asked.scheduler)
        count = asked.batch_size * asked.n_iter
        seed = asked.seed if asked.seed is not None and asked.seed >= 0 else asking.some_seed(count)
        skip = _stop_at(override) or clients.options(client).get("CLIP_stop_at_last_layers", 1)
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
            schedule=schedule,  # pyright: ignore[reportArgumentType]
            count=count,
            clip_skip=skip - 1,
            **(asked.given() if isinstance(asked, ImageToImage) else {}),
        )
        [job] = asking.accept(control, request, client=f"a1111 {client.address}")
        return job

    @api.get("/sd-models")
    def sd_models() -> list[dict[str, Any]]:
        return [_listed(model) for model in control.library.models()]

    @api.get("/samplers")
    def samplers() -> list[dict[str, Any]]:
        return [{"name": s.a1111, "aliases": [name], "options": {}} for name, s in SAMPLERS.items()]

    @api.get("/schedulers")
    def schedulers() -> list[dict[str, Any]]:
        return [
            {"name": name, "label": label, "aliases": None, "default_rho": -1, "need_inner_model": False}
            for name, label in LABELS.items()
        ]

    @api.get("/upscalers")
    def upscalers() -> list[dict[str, Any]]:
        none = {"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 1}
        return [none]

    @api.get("/sd-vae")
    @api.get("/hypernetworks")
    @api.get("/prompt-styles")
    @api.get("/face-restorers")
    @api.get("/realesrgan-models")
    @api.get("/latent-upscale-modes")
    def none_yet() -> list[dict[str, Any]]:
        """There are none."""
        return []

    @api.get("/loras")
    def loras() -> list[dict[str, Any]]:
        """For ``<lora:name:strength>`` in a prompt."""
        return [
            {"name": found.name, "alias": found.name, "path": found.path.name, "metadata": found.summary()}
            for found in control.shelves.adapters.all()
        ]

    @api.get("/embeddings")
    def embeddings() -> dict[str, dict[str, Any]]:
        return {"loaded": {}, "skipped": {}}

    @api.get("/scripts")
    def scripts() -> dict[str, list[str]]:
        return {"txt2img": [], "img2img": []}

    @api.get("/options")
    def options(http: HTTPRequest) -> dict[str, Any]:
        client = client_of(http)
        own = clients.options(client)
        return _options(current(client)) | {k: v for k, v in own.items() if k != "sd_model_checkpoint"}

    @api.post("/options")
    def set_options(given: dict[str, Any], http: HTTPRequest) -> dict[str, Any]:
        """Of this client only. Answers with what has no meaning here and was not taken."""
        client = client_of(http)
        known = _options(current(client) if "sd_model_checkpoint" not in given else asking.default_model(control))
        taken: dict[str, Any] = {}
        if given.get("sd_model_checkpoint"):
            taken["sd_model_checkpoint"] = _title(by_title(control, str(given["sd_model_checkpoint"])))
        if (skip := _stop_at(given)) is not None:
            taken["CLIP_stop_at_last_layers"] = skip
        clients.set(client, taken)
        same = {name for name, value in given.items() if known.get(name) == value}
        return {"ignored": sorted(set(given) - set(taken) - same - {"sd_checkpoint_hash"})}

    @api.get("/progress")
    def progress(skip_current_image: bool = False) -> dict[str, Any]:
        """Of the job that runs, whoever asked for it."""
        return _progress(control.dispatcher.state, skip_current_image)

    @api.post("/interrupt")
    @api.post("/skip")
    def interrupt(http: HTTPRequest) -> dict[str, Any]:
        """Stop the job that runs, if it was asked for from this address."""
        state = control.dispatcher.state
        if state is not None and state.job.client == f"a1111 {client_of(http).address}":
            control.dispatcher.cancel(state.job.id)
        return {}

    @api.post("/refresh-checkpoints")
    @api.post("/refresh-loras")
    def refresh() -> dict[str, Any]:
        """Lists are always fresh."""
        return {}

    @api.post("/png-info")
    def png_info(picture: Picture) -> PngInfo:
        try:
            data = base64.b64decode(picture.image.rpartition(",")[2], validate=True)
            with PILImage.open(io.BytesIO(data)) as image:
                items = {str(key): value for key, value in image.info.items() if isinstance(value, str)}
        except (binascii.Error, OSError, SyntaxError, ValueError, PILImage.DecompressionBombError) as error:
            raise RefusedError(
                422, "invalid_request", f"image: is not one that can be read ({error})", "image"
            ) from error
        return PngInfo(info=items.get("parameters", ""), items=items, parameters={})

    @api.get("/cmd-flags")
    def cmd_flags() -> dict[str, Any]:
        return {"api": True, "listen": not auth.is_loopback(control.settings.host), "port": control.settings.port}

    @api.get("/memory")
    def memory() -> dict[str, Any]:
        """In A1111's form. Sizes are bytes."""
        try:
            places = control.supervisor.ask("memory").result(30)["places"]
        except (WorkerDiedError, TimeoutError, RuntimeError) as error:
            raise RefusedError(503, "worker_not_ready", str(error)) from error
        told = {
            place: {"free": v["budget"] - v["stored"] - v["promised"], "used": v["stored"], "total": v["budget"]}
            for place, v in places.items()
        }
        host = told.pop("host")
        return {"ram": host, "cuda": next(iter(told.values()), {"error": "unavailable"})}

    @outside.get("/internal/ping", tags=["AUTOMATIC1111"])
    def ping() -> dict[str, Any]:
        return {}

    made = APIRouter()
    made.include_router(api)
    made.include_router(outside)
    return made


def by_title(control: Control, title: str) -> Model:
    """A model by A1111's title (``name [hash]``), its name, file name or hash.

    Raises ModelNotFoundError, and RefusedError for a hash that is not the model's or a file name that several have.
    """
    name, _, mark = title.removesuffix("]").rpartition(" [") if title.endswith("]") else (title, "", "")
    named = control.library.find_named(name)
    if named is not None:
        if not named.digest.startswith(mark):
            message = f"the model {name} has the content {named.digest[:10]} now, not {mark}"
            raise RefusedError(409, "which_model", message, "sd_model_checkpoint")
        return named
    models = control.library.models()
    found = [m for m in models if name in (m.digest, m.digest[:10], m.path.name, m.path.stem)]
    if len(found) > 1:
        names = ", ".join(model.name for model in found)
        raise RefusedError(409, "which_model", f"{name} may be {names}; give its name", "sd_model_checkpoint")
    return found[0] if found else asking.model_named(control, name)


def sampler_of(name: str, scheduler: str | None) -> tuple[str, str]:
    """Ours for A1111's sampler and schedule type; older clients write ``DPM++ 2M Karras``. Raises RequestError."""
    schedule = SCHEDULES.get((scheduler or "automatic").lower().replace("_", " "))
    schedule = scheduler if schedule is None and scheduler in LABELS else schedule
    if schedule is None:
        raise RequestError("scheduler", scheduler, f"must be one of {', '.join(LABELS.values())}")
    found = _sampler(name)
    if found is None:
        for label, ours in (("karras", "karras"), ("exponential", "exponential"), ("sgm uniform", "sgm_uniform")):
            if name.lower().endswith(f" {label}"):
                found, schedule = _sampler(name[: -len(label) - 1]), ours
    if found is None:
        known = ", ".join(sampler.a1111 for sampler in SAMPLERS.values())
        raise RequestError("sampler_name", name, f"must be one of {known}")
    return found, schedule


def _sampler(name: str) -> str | None:
    lower = name.lower()
    return next((ours for ours, sampler in SAMPLERS.items() if lower in (sampler.a1111.lower(), ours)), None)


def _refuse(asked: TextToImage) -> None:
    """Raise RequestError for what Safelight cannot do yet, or does not know."""
    for name, value in (asked.model_extra or {}).items():
        if name not in WITHOUT_EFFECT and not _neutral(name, value):
            raise RequestError(name, value, "Safelight cannot do this yet")
    for name, value in (asked.override_settings or {}).items():
        if name in ("sd_model_checkpoint", "CLIP_stop_at_last_layers", "sd_checkpoint_hash"):
            continue
        if not _neutral(name, value):
            raise RequestError(f"override_settings.{name}", value, "Safelight has no such option")


def _neutral(name: str, value: object) -> bool:
    return value in NOTHING or value in NEUTRAL.get(name, ())


def _stop_at(options: dict[str, Any]) -> int | None:
    """``CLIP_stop_at_last_layers``, if it is given. Raises RequestError when it is no number of layers."""
    skip = options.get("CLIP_stop_at_last_layers")
    if skip is None:
        return None
    if isinstance(skip, bool) or not isinstance(skip, int | float) or skip not in range(1, 13):
        raise RequestError("CLIP_stop_at_last_layers", skip, "must be a whole number from 1 to 12")
    return int(skip)


def _title(model: Model) -> str:
    return f"{model.name} [{model.digest[:10]}]"


def _listed(model: Model) -> dict[str, Any]:
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


def _progress(state: State | None, skip_image: bool) -> dict[str, Any]:
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
    done = now.image * job.request.steps + (now.step if now.stage == "denoise" else 0)
    done += job.request.steps if now.stage == "decode" else 0
    share = done / (job.request.steps * job.request.count)
    spent = time.time() - state.since
    stamp = time.strftime("%Y%m%d%H%M%S", time.localtime(state.since))
    count = {"job": job.id, "job_count": job.request.count, "job_timestamp": stamp, "job_no": now.image}
    at = {"sampling_step": now.step if now.stage == "denoise" else 0, "sampling_steps": job.request.steps}
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


def _made(control: Control, job: Job, asked: TextToImage) -> Made:
    if job.state == "failed":
        raise RefusedError(500, "failed", job.reason)
    images = control.database.images(1000, job=job.id)
    request = job.request
    texts = [parameters(image.metadata) for image in images]
    seeds = [image.seed for image in images]
    info = {
        "prompt": request.prompt,
        "all_prompts": [request.prompt] * len(images),
        "negative_prompt": request.negative,
        "all_negative_prompts": [request.negative] * len(images),
        "seed": request.seed,
        "all_seeds": seeds,
        "subseed": request.seed,
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": request.width,
        "height": request.height,
        "sampler_name": SAMPLERS[request.sampler].a1111,
        "cfg_scale": request.cfg,
        "steps": request.steps,
        "batch_size": asked.batch_size,
        "sd_model_name": request.model,
        "sd_model_hash": job.model_digest[:10],
        "clip_skip": request.clip_skip + 1,
        "infotexts": texts,
        "extra_generation_params": {"Schedule type": LABELS[request.schedule]},
        "index_of_first_image": 0,
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(job.created)),
        "is_using_inpainting_conditioning": False,
        "interrupted": job.state == "cancelled",
    }
    encoded = [base64.b64encode(control.gallery.path(image.file).read_bytes()).decode() for image in images]
    left_out = {"init_images", "mask"} if not getattr(asked, "include_init_images", True) else set[str]()
    given = asked.model_dump(exclude=left_out)
    return Made(images=encoded if asked.send_images else [], parameters=given, info=json.dumps(info))
