"""Routes that make images: ``txt2img`` and ``img2img``."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from pydantic import BaseModel

from safelight.assembly.services import Services
from safelight.catalog.model import Model
from safelight.errors import ModelNotFoundError, RequestError
from safelight.pictures.chunks import parameters, schedule_label
from safelight.queue.database import StoredImage
from safelight.queue.job import QueuedJob
from safelight.queue.person import Person
from safelight.request.field import fields_of
from safelight.request.model_defaults import OWN_VAE as OWN
from safelight.request.samplers import Schedule, a1111_name
from safelight.request.schema import Request
from safelight.server import bridge, intake
from safelight.server.access import person_of
from safelight.server.apis.a1111_fields import ImageToImage, TextToImage, refuse_evenly, refuse_unknown, sampler_of
from safelight.server.apis.a1111_options import OWN_VAE, current_model, stop_at
from safelight.server.apis.a1111_progress import RunningRequests
from safelight.server.apis.a1111_titles import by_title
from safelight.server.clients import Client, Clients, client_of
from safelight.server.problems import RefusedError, of_job

_REFINER_START: float = fields_of(Request)["refiner_start"].default


class GenerationAnswer(BaseModel):
    """The finished images. ``images``: PNG files in base64; ``info``: JSON as text."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


class GenerationRoutes:
    """The routes that make images."""

    def __init__(self, control: Services, clients: Clients, requests: RunningRequests) -> None:
        self._control, self._clients, self._requests = control, clients, requests

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.post("/txt2img")(self.txt2img)
        api.post("/img2img")(self.img2img)

    async def txt2img(self, asked: TextToImage, http: HTTPRequest) -> GenerationAnswer:
        """Make images and return them."""
        return await self._make_images(asked, http)

    async def img2img(self, asked: ImageToImage, http: HTTPRequest) -> GenerationAnswer:
        """Make images from an image, or redraw its masked part, and return them."""
        return await self._make_images(asked, http)

    async def _make_images(self, asked: TextToImage, http: HTTPRequest) -> GenerationAnswer:
        jobs = await bridge.run(self._queue_jobs, asked, client_of(http), person_of(http))
        with self._requests.running(jobs):
            jobs = await intake.all_ended(self._control, jobs, http)
        return await bridge.run(_answer, self._control, jobs, asked)

    def _queue_jobs(self, asked: TextToImage, client: Client, who: Person) -> list[QueuedJob]:
        """Build the request from a client's fields and options, and queue it."""
        refuse_unknown(asked)
        override = asked.override_settings or {}
        model = self._model(override, client)
        sampler, schedule = _sampling(asked, model)
        width, height = (_given(asked, side, model, side) for side in ("width", "height"))
        # Other values follow from the size, so it must be known, also if it is a default.
        sides = {"width": width or model.defaults.get("width"), "height": height or model.defaults.get("height")}
        asked = asked.model_copy(update=sides)
        count = asked.batch_size * asked.n_iter
        seed = asked.seed if asked.seed is not None and asked.seed >= 0 else intake.some_seed(count)
        strength = asked.subseed_strength or 0.0
        subseed = asked.subseed if asked.subseed is not None and asked.subseed >= 0 else intake.some_seed(count)
        vae = override.get("sd_vae") or self._clients.option(client, "sd_vae") or OWN_VAE[0]
        skip = _layers(asked, override) or self._clients.option(client, "CLIP_stop_at_last_layers") or 1
        default_skip = skip == 1 and not _layers(asked, override) and "clip_skip" in model.defaults
        if not model.family.clip_skip_in_a1111:
            # A1111 ignores this option for some families, such as SDXL.
            skip = 1
        refiner = asked.refiner()
        request = Request(
            prompt=asked.prompt,
            model=model.name,
            negative=asked.negative_prompt or "",
            seed=seed,
            steps=_given(asked, "steps", model, "steps"),
            width=width,
            height=height,
            cfg=_given(asked, "cfg_scale", model, "cfg"),
            # Forge's clients send it for every model.
            guidance=asked.distilled_cfg_scale if model.has_distilled_guidance else None,
            sampler=sampler,
            schedule=schedule,
            count=count,
            clip_skip=None if default_skip else skip - 1,
            vae={"Automatic": "", "None": OWN}.get(str(vae), str(vae)),
            variation_seed=subseed if strength else 0,
            variation_strength=strength,
            refiner="" if refiner is None else self._refiner(refiner[0]),
            refiner_start=_REFINER_START if refiner is None else refiner[1],
            **asked.given(),
        )
        return intake.accept(self._control, request, who=who, client=f"a1111 {client.address}", spread=True)

    def _refiner(self, title: str) -> str:
        """Return the name of the refiner with a title. Raises RequestError if there is no such model."""
        try:
            return by_title(self._control, title).name
        except ModelNotFoundError as error:
            raise RequestError("refiner_checkpoint", title, f"is not the title of a model: {error}") from error

    def _model(self, override: dict[str, Any], client: Client) -> Model:
        """Return the model of ``override_settings``, or else the client's current one."""
        wanted = override.get("sd_model_checkpoint")
        model = by_title(self._control, str(wanted)) if wanted else current_model(self._control, self._clients, client)
        mark = override.get("sd_checkpoint_hash")
        if mark and not model.digest.startswith(str(mark)):
            message = f"the model {model.name} has the hash {model.digest[:10]}, not {mark}"
            raise RefusedError(409, "which_model", message, "sd_checkpoint_hash")
        return model


def _given(asked: TextToImage, name: str, model: Model, field: str) -> Any:
    """Return the value of A1111's field ``name``, or A1111's default for it.

    None if the client does not send it and the model has a default for ``field``.
    """
    if name not in asked.model_fields_set and field in model.defaults:
        return None
    value = getattr(asked, name)
    unset = value is None or (name in ("width", "height") and not value)
    return TextToImage.model_fields[name].default if unset else value


def _sampling(asked: TextToImage, model: Model) -> tuple[str | None, Schedule | None]:
    """Return sampler and schedule. Both are None if the client names none and the model has a default for one."""
    name = asked.sampler_name or asked.sampler_index
    if not name and not asked.scheduler and model.defaults.keys() & {"sampler", "schedule"}:
        return None, None
    refuse_evenly(asked.scheduler, model.family.noise.kind)
    return sampler_of(name or a1111_name(model.defaults.get("sampler", "euler")), asked.scheduler)


def _layers(asked: TextToImage, override: dict[str, Any]) -> int | None:
    """Return the text encoder's last layer: A1111's option, or else SD.Next's field; SillyTavern sends both."""
    option = stop_at(override)
    if option is None:
        return asked.clip_skip
    if asked.clip_skip not in (None, 1, option):
        raise RequestError("clip_skip", asked.clip_skip, f"differs from CLIP_stop_at_last_layers, {option}")
    return option


def _answer(control: Services, jobs: list[QueuedJob], asked: TextToImage) -> GenerationAnswer:
    """Return the images of a request's jobs. Raises the error of a job that failed."""
    job = next((job for job in jobs if job.state == "failed"), jobs[0])
    if job.state == "failed":
        raise of_job(job)
    images = [image for one in jobs for image in control.database.images.of_job(one.id)]
    info = _info(jobs, job, images, asked.batch_size)
    encoded = [base64.b64encode(control.gallery.path(image).read_bytes()).decode() for image in images]
    left_out = {"init_images", "mask"} if not getattr(asked, "include_init_images", True) else set[str]()
    # These contain the pictures of ControlNets, which A1111 does not send back either.
    given = asked.model_dump(exclude=left_out | {"alwayson_scripts"})
    return GenerationAnswer(images=encoded if asked.send_images else [], parameters=given, info=json.dumps(info))


def _info(jobs: list[QueuedJob], job: QueuedJob, images: list[StoredImage], batch_size: int) -> dict[str, Any]:
    """Return A1111's ``info`` about the images; ``job``: the job whose values stand for the whole request."""
    request = job.request
    texts = [parameters(image.metadata) for image in images]
    seeds = [image.seed for image in images]
    requests = [image.metadata["request"] for image in images]
    subseeds = [each["variation_seed"] if each["variation_strength"] else each["seed"] for each in requests]
    return {
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
        "sampler_name": a1111_name(request.sampler_name),
        "cfg_scale": request.cfg,
        "steps": request.steps,
        "batch_size": batch_size,
        "sd_model_name": request.model,
        "sd_model_hash": job.model_digest[:10],
        "clip_skip": request.skipped_layers + 1,
        "infotexts": texts,
        "extra_generation_params": {"Schedule type": schedule_label(request.sampler_name, request.schedule_name)},
        "index_of_first_image": 0,
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(job.created)),
        "is_using_inpainting_conditioning": False,
        "interrupted": any(job.state == "cancelled" for job in jobs),
    }
