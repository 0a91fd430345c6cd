"""OpenAI's API for images, as its clients speak it: models, generations, and edits."""

from __future__ import annotations

import base64
import io
import re
import time
from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, UploadFile
from fastapi import Request as HTTPRequest
from PIL import ImageOps
from pydantic import BaseModel, ConfigDict, Field

from safelight.assemble.serving import Control
from safelight.errors import RequestError
from safelight.jobs.job import Job
from safelight.library.inputs import opened
from safelight.library.model import Model
from safelight.server import asking, bridge
from safelight.server.problems import RefusedError
from safelight.types.request import Request

_NOTHING: Mapping[str, Any] = MappingProxyType({})

_KNOWN = frozenset(field.name for field in fields(Request))


class ModelCard(BaseModel):
    """A model, in OpenAI's form."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "safelight"


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Generation(BaseModel):
    """OpenAI's fields; beside them Safelight's, which its clients give as ``extra_body``."""

    model_config = ConfigDict(extra="allow")

    prompt: str
    model: str | None = None
    n: int | None = Field(default=1, ge=1, le=64)
    size: str | None = Field(default=None, description="WIDTHxHEIGHT in pixels, or auto: the model's own")
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Literal["png"] | None = None
    quality: str | None = None
    style: str | None = None
    user: str | None = None
    seed: int | None = Field(default=None, ge=0)
    steps: int = 20
    cfg: float = 7.0
    negative: str = ""
    sampler: str = "euler"


class Datum(BaseModel):
    """An image: ``url`` or ``b64_json``."""

    url: str | None = None
    b64_json: str | None = None
    revised_prompt: str | None = None


class Images(BaseModel):
    """The answer. ``model`` and ``model_digest`` say what made them."""

    created: int
    data: list[Datum]
    model: str
    model_digest: str


class OpenAIError(BaseModel):
    """OpenAI's form of an error."""

    error: dict[str, Any]


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": OpenAIError, "description": "an error in OpenAI's form"}
    for status in (400, 401, 403, 404, 409, 413, 422, 429, 500)
}


def router(control: Control) -> APIRouter:
    """The routes over a control."""
    api = APIRouter(prefix="/v1", tags=["OpenAI"], responses=ERRORS)

    @api.get("/models")
    def models() -> ModelList:
        return ModelList(data=[ModelCard(id=card.name) for card in control.library.cards()])

    @api.get("/models/{name}")
    def one_model(name: str) -> ModelCard:
        return ModelCard(id=control.library.get(name).name)

    @api.post("/images/generations", response_model_exclude_none=True)
    async def generations(asked: Generation, http: HTTPRequest) -> Images:
        """Make images and answer with them."""
        jobs = await bridge.run(_accepted, control, asked)
        jobs = await asking.all_ended(control, jobs, http)
        return await bridge.run(_answer, control, jobs, asked, str(http.base_url).rstrip("/"))

    @api.post("/images/edits", response_model_exclude_none=True)
    async def edits(
        http: HTTPRequest,
        prompt: Annotated[str, Form()],
        image: Annotated[UploadFile, File(description="what to start from")],
        mask: Annotated[
            UploadFile | None,
            File(description="what is transparent in it is drawn anew; by default what is transparent in the image"),
        ] = None,
        model: Annotated[str | None, Form()] = None,
        n: Annotated[int | None, Form(ge=1, le=64)] = 1,
        size: Annotated[str | None, Form()] = None,
        response_format: Annotated[Literal["url", "b64_json"] | None, Form()] = None,
        output_format: Annotated[Literal["png"] | None, Form()] = None,
        user: Annotated[str | None, Form()] = None,
        seed: Annotated[int | None, Form(ge=0)] = None,
        steps: Annotated[int, Form()] = 20,
        cfg: Annotated[float, Form()] = 7.0,
        negative: Annotated[str, Form()] = "",
        sampler: Annotated[str, Form()] = "euler",
        strength: Annotated[float, Form()] = 0.75,
    ) -> Images:
        """Make images from an image, or draw a part of it anew, and answer with them."""
        fields = {"n": n, "size": size, "response_format": response_format, "user": user, "seed": seed}
        more = {"steps": steps, "cfg": cfg, "negative": negative, "sampler": sampler, "output_format": output_format}
        form = await http.form()
        known = {"prompt", "image", "mask", "model", "strength", *fields, *more}
        rest = {name: form[name] for name in form if name not in known}
        asked = Generation(prompt=prompt, model=model, **fields, **more, **rest)  # pyright: ignore[reportArgumentType]
        keep = control.shelves.inputs.keep
        picture = await image.read()
        given = {"image": await bridge.run(keep, "image", picture), "strength": strength}
        transparent = await bridge.run(_transparent, picture if mask is None else await mask.read())
        if transparent is not None:
            given["mask"] = await bridge.run(keep, "mask", transparent)
        elif mask is not None:
            raise RequestError("mask", mask.filename or "", "has no transparency, which says what is drawn anew")
        jobs = await bridge.run(_accepted, control, asked, given)
        jobs = await asking.all_ended(control, jobs, http)
        return await bridge.run(_answer, control, jobs, asked, str(http.base_url).rstrip("/"))

    return api


def _transparent(picture: bytes) -> bytes | None:
    """A mask, white where the picture is transparent; None where nothing is. Raises RequestError for no picture."""
    alpha = opened("mask", picture, transparent=True).getchannel("A")
    if alpha.getextrema() == (255, 255):
        return None
    held = io.BytesIO()
    ImageOps.invert(alpha).save(held, "PNG")
    return held.getvalue()


def _accepted(control: Control, asked: Generation, given: Mapping[str, Any] = _NOTHING) -> list[Job]:
    for name, value in (asked.model_extra or {}).items():
        if name in _KNOWN:
            raise RequestError(name, value, "cannot be asked for here; Safelight's own API takes it")
    model = control.library.get(asked.model) if asked.model else asking.default_model(control)
    width, height = (None, None) if given and asked.size in (None, "auto") else _size(asked.size, model)
    count = asked.n or 1
    seed = asking.some_seed(count) if asked.seed is None else asked.seed
    request = Request(
        prompt=asked.prompt,
        model=model.name,
        negative=asked.negative,
        seed=seed,
        steps=asked.steps,
        width=width,
        height=height,
        cfg=asked.cfg,
        sampler=asked.sampler,
        count=count,
        **given,
    )
    return asking.accept(control, request, client=f"openai {asked.user or ''}".strip())


def _size(size: str | None, model: Model) -> tuple[int, int]:
    if size is None or size == "auto":
        return model.resolution, model.resolution
    found = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", size)
    if found is None:
        raise RequestError("size", size, "must be WIDTHxHEIGHT in pixels, such as 512x512, or auto")
    return int(found[1]), int(found[2])


def _answer(control: Control, jobs: list[Job], asked: Generation, base: str) -> Images:
    job = next((job for job in jobs if job.state != "done"), jobs[0])
    if job.state != "done":
        raise RefusedError(500 if job.state == "failed" else 409, job.state, job.reason)
    data: list[Datum] = []
    for image in (image for one in jobs for image in control.database.images(1000, job=one.id)):
        if asked.response_format == "b64_json":
            data.append(Datum(b64_json=base64.b64encode(control.gallery.path(image.file).read_bytes()).decode()))
        else:
            data.append(Datum(url=f"{base}/api/v1/images/{image.id}/file"))
    return Images(created=int(time.time()), data=data, model=job.request.model, model_digest=job.model_digest)
