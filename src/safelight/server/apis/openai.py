"""OpenAI's API for images under ``/v1``: models, generations and edits."""

from __future__ import annotations

import base64
import io
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, File, Form, UploadFile
from fastapi import Request as HTTPRequest
from PIL import Image as PILImage
from PIL import ImageOps
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from sse_starlette.sse import EventSourceResponse
from starlette.datastructures import FormData

from safelight.assembly.services import Services
from safelight.catalog.inputs import decode_image
from safelight.catalog.model import Model
from safelight.errors import RequestError
from safelight.families.features import Feature
from safelight.pictures.file_format import LOSSLESS, ImageFormat, encode_picture
from safelight.queue.database import StoredImage
from safelight.queue.job import QueuedJob
from safelight.queue.person import Person
from safelight.request.bounds import MOST_REFERENCES
from safelight.request.samplers import parse_sampler_and_schedule
from safelight.request.schema import Request
from safelight.server import access, bridge, event_stream, intake
from safelight.server.apis.openai_stream import Stream
from safelight.server.problems import of_job, response
from safelight.server.sub_path import public_address


class ModelCard(BaseModel):
    """A model, in OpenAI's form."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "safelight"


class ModelList(BaseModel):
    """The list of all models, in OpenAI's form."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ImageGeneration(BaseModel):
    """OpenAI's fields, Safelight's own, and the names of other programs for those.

    OpenAI's client sends Safelight's fields as ``extra_body``.
    """

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _no_switches(cls, given: Any) -> Any:
        """Reject ``true`` and ``false`` as numbers, which pydantic would accept."""
        numbers = ("n", "seed", "steps", "cfg", "strength", "output_compression", "partial_images", *ALIASES)
        fields = cast("dict[str, Any]", given) if isinstance(given, dict) else {}
        wrong = next((name for name in numbers if isinstance(fields.get(name), bool)), None)
        if wrong is not None:
            raise RequestError(wrong, fields[wrong], "must be a number")
        return given

    prompt: str
    model: str | None = None
    n: int | None = Field(default=1, ge=1, le=64)
    size: str | None = Field(default=None, description="WIDTHxHEIGHT in pixels, or auto: the model's own size")
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(default=None, ge=0, le=100, description="quality of jpeg and webp, percent")
    quality: Literal["auto", "low", "standard", "medium", "high", "hd"] | None = Field(
        default=None, description="if steps is not set: low halves the steps, high and hd double them"
    )
    stream: bool | None = Field(default=None, description="send events: previews, then each image in base64")
    partial_images: int | None = Field(default=None, ge=0, le=3, description="previews of each image in the stream")
    user: str | None = None
    seed: int | None = Field(default=None, ge=0)
    steps: int | None = None
    cfg: float | None = None
    negative: str | None = None
    sampler: str | None = None
    schedule: str | None = None
    strength: float | None = Field(default=None, description="for edits: the denoising strength")

    def refuse_unknown(self) -> None:
        """Raise RequestError for an unknown field, and for a value that Safelight does not support."""
        for name, value in (self.model_extra or {}).items():
            if name in ALIASES:
                continue
            if name not in NEUTRAL:
                raise RequestError(name, value, "is unknown here; Safelight's own API has more fields")
            if value is not None and str(value).lower() not in NEUTRAL[name]:
                raise RequestError(name, value, "is not supported")
        if self.output_compression not in (None, 100) and self.output_format in (None, "png"):
            problem = "needs output_format jpeg or webp; PNG is always lossless"
            raise RequestError("output_compression", self.output_compression, problem)
        if self.partial_images and not self.stream:
            raise RequestError("partial_images", self.partial_images, "needs stream: true")
        if self.stream and self.response_format == "url":
            raise RequestError("response_format", "url", "a stream sends images in base64: use b64_json")

    def asked(self, name: str) -> Any:
        """Return the value of one of Safelight's fields, from this name or an alias; None if it is not set.

        Raises RequestError when two of its names have different values.
        """
        given = {name: getattr(self, name)} if getattr(self, name) is not None else {}
        extra = (self.model_extra or {}).items()
        given |= {alias: value for alias, value in extra if ALIASES.get(alias) == name and value is not None}
        values = list(given.values())
        if any(value != values[0] for value in values[1:]):
            listed = ", ".join(f"{each}={value!r}" for each, value in given.items())
            raise RequestError(list(given)[-1], values[-1], f"is another name for {name}, and they differ: {listed}")
        return values[0] if values else None

    @property
    def as_base64(self) -> bool:
        """Whether the answer contains the images in base64 instead of URLs.

        OpenAI's newer models always answer so. A request with fields of those models is taken as one to them.
        """
        newer = {"output_format", "output_compression", "stream", "partial_images"} | NEUTRAL.keys() - {"style"}
        new = newer & {*self.model_fields_set, *(self.model_extra or {})} or self.quality in NEWER_QUALITIES
        return self.response_format == "b64_json" or (self.response_format is None and bool(new))


ALIASES: Mapping[str, str] = {
    "negative_prompt": "negative",
    "num_inference_steps": "steps",
    "cfg_scale": "cfg",
    "guidance_scale": "cfg",
    "sampler_name": "sampler",
    "scheduler": "schedule",
    "denoising_strength": "strength",
}
"""The names of other programs for Safelight's fields."""

NEUTRAL: Mapping[str, tuple[str, ...]] = {
    "background": ("auto", "opaque"),
    "input_fidelity": ("low",),
    "moderation": ("auto", "low"),
    "style": ("vivid",),
}
"""OpenAI's fields that Safelight does not implement, with their neutral values; others are errors."""

NEWER_QUALITIES = ("auto", "low", "medium", "high")

STEPS = 20
QUALITY_STEPS: Mapping[str, int] = {"low": STEPS // 2, "high": STEPS * 2, "hd": STEPS * 2}


class Datum(BaseModel):
    """An image, as ``url`` or ``b64_json``."""

    url: str | None = None
    b64_json: str | None = None
    revised_prompt: str | None = None


class Images(BaseModel):
    """The answer with the images. ``model`` and ``model_digest``: the model that made them."""

    created: int
    data: list[Datum]
    model: str
    model_digest: str


class OpenAIError(BaseModel):
    """An error in OpenAI's form."""

    error: dict[str, Any]


STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "the images, or events"}
}
"""The description of both answers in the OpenAPI document."""

ERRORS: dict[int | str, dict[str, Any]] = {
    status: response(OpenAIError, "an error in OpenAI's form")
    for status in (400, 401, 403, 404, 409, 413, 422, 429, 500, 503, 507)
}


def router(control: Services) -> APIRouter:
    """Return the router with OpenAI's routes."""
    api = APIRouter(prefix="/v1", tags=["OpenAI"], responses=ERRORS)
    OpenAIRoutes(control).add_to(api)
    return api


VARIATION_STRENGTH = 0.5
"""The denoising strength of a variation: the composition stays, details change."""


class OpenAIRoutes:
    """OpenAI's routes."""

    def __init__(self, control: Services) -> None:
        self._control = control

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.get("/models")(self.models)
        api.get("/models/{name}")(self.one_model)
        images: dict[str, Any] = {"response_model": Images, "response_model_exclude_none": True, "responses": STREAM}
        api.post("/images/generations", **images)(self.generations)
        api.post("/images/edits", **images)(self.edits)
        api.post("/images/variations", **images)(self.variations)

    def models(self) -> ModelList:
        """List the models, in OpenAI's form."""
        return ModelList(data=[_card(card.name, card.record_path) for card in self._control.library.cards()])

    def one_model(self, name: str) -> ModelCard:
        """Return a model, in OpenAI's form."""
        card = next((card for card in self._control.library.cards() if card.name == name), None)
        return _card(name, card.record_path) if card is not None else ModelCard(id=self._control.library.get(name).name)

    async def generations(self, asked: ImageGeneration, http: HTTPRequest) -> Images | EventSourceResponse:
        """Make images and return them, or send them as events (``stream``)."""
        return await self._make_images(asked, http)

    async def edits(
        self,
        http: HTTPRequest,
        prompt: Annotated[str, Form()],
        image: Annotated[
            list[UploadFile] | None,
            File(
                description="the pictures to edit. A model that edits by reference sees them all; with a mask or a"
                " strength, it also starts from the first. Another model takes one, and starts from it"
            ),
        ] = None,
        images: Annotated[
            list[UploadFile] | None,
            File(alias="image[]", description="the same"),
        ] = None,
        mask: Annotated[
            UploadFile | None,
            File(description="Safelight redraws what is transparent in the mask, or in the image if there is no mask"),
        ] = None,
    ) -> Images | EventSourceResponse:
        """Make images from an image, or redraw a part of it, and return them, or send them as events (``stream``).

        The other fields are those of generations.
        """
        given = [*(image or ()), *(images or ())]
        if not 0 < len(given) <= MOST_REFERENCES:
            problem = f"at most {MOST_REFERENCES} pictures are supported" if given else "an image is required"
            raise RequestError("image", f"{len(given)} pictures", problem)
        asked = _read({"prompt": prompt, **_texts(await http.form())})
        store = partial(intake.store_input, self._control, access.person_of(http))
        pictures = [await picture.read() for picture in given]
        digests = [await bridge.run(store, "image", picture) for picture in pictures]
        transparent = await bridge.run(_transparent, pictures[0] if mask is None else await mask.read())
        if transparent is None and mask is not None:
            raise RequestError("mask", mask.filename or "", "has no transparency: make the part to redraw transparent")
        masked = "" if transparent is None else await bridge.run(store, "mask", transparent)
        return await self._make_images(asked, http, Edit(tuple(digests), masked))

    async def variations(
        self, http: HTTPRequest, image: Annotated[UploadFile, File(description="the picture to vary")]
    ) -> Images | EventSourceResponse:
        """Make images that resemble a picture: it is drawn again in part, without a prompt, from other noise.

        The other fields are those of edits. ``strength`` is 0.5 if it is not set.
        """
        form = await http.form()
        for name in ("prompt", "mask", "image[]"):
            if name in form:
                raise RequestError(name, "", "is not for variations; use images/edits")
        if len(form.getlist("image")) > 1:
            raise RequestError("image", f"{len(form.getlist('image'))} pictures", "a variation is of one picture")
        asked = _read({"prompt": "", **_texts(form)})
        if asked.asked("strength") is None:
            asked = asked.model_copy(update={"strength": VARIATION_STRENGTH})
        who = access.person_of(http)
        digest = await bridge.run(intake.store_input, self._control, who, "image", await image.read())
        return await self._make_images(asked, http, Edit((digest,), ""))

    async def _make_images(
        self, asked: ImageGeneration, http: HTTPRequest, edit: Edit | None = None
    ) -> Images | EventSourceResponse:
        """Make images and return them. ``edit``: the pictures to edit; None to draw from text alone."""
        jobs = await bridge.run(_queue, self._control, asked, edit, access.person_of(http))
        if asked.stream:
            stream = Stream(
                self._control,
                jobs,
                "image_generation" if edit is None else "image_edit",
                asked.partial_images or 0,
                asked.output_format or "png",
                asked.quality if asked.quality in ("low", "medium", "high") else "auto",
                partial(_in_base64, self._control, asked),
            )
            return event_stream.answer(stream.events())
        jobs = await intake.all_ended(self._control, jobs, http)
        return await bridge.run(_answer, self._control, jobs, asked, public_address(http, self._control.settings))


def _texts(form: FormData) -> dict[str, str]:
    """Return the text fields of a form, without the prompt.

    Raises RequestError when a field is present twice, or a text field contains a file.
    """
    given = [name for name, _ in form.multi_items()]
    found: dict[str, str] = {}
    for name, value in form.multi_items():
        if name in ("image", "image[]"):
            continue
        if given.count(name) > 1:
            raise RequestError(name, "", f"is given {given.count(name)} times")
        if name in ("mask", "prompt"):
            continue
        if not isinstance(value, str):
            raise RequestError(name, value.filename or "", "is a file; it must be a text")
        found[name] = value
    return found


def _read(fields: Mapping[str, str]) -> ImageGeneration:
    """Check the fields of a form. Raises RequestError, with the field's name, for a value that is not allowed."""
    try:
        return ImageGeneration.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise RequestError(name, fields.get(name), first["msg"]) from error


def _card(name: str, record: Path) -> ModelCard:
    """``created``: the time at which the model was added, in seconds since 1970; 0 if unknown."""
    try:
        return ModelCard(id=name, created=int(record.stat().st_mtime))
    except OSError:
        return ModelCard(id=name)


def _transparent(picture: bytes) -> bytes | None:
    """Return a mask as PNG, white where the picture is transparent, or None if nothing is transparent.

    Raises RequestError when ``picture`` is not an image.
    """
    alpha = decode_image("mask", picture, transparent=True).getchannel("A")
    if alpha.getextrema() == (255, 255):
        return None
    file = io.BytesIO()
    ImageOps.invert(alpha).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True, slots=True)
class Edit:
    """Stored pictures to edit, by their digests. ``mask``: belongs to the first picture; "" for none."""

    pictures: tuple[str, ...]
    mask: str

    def fields(self, model: Model, has_strength: bool) -> dict[str, Any]:
        """Return the fields of a request for a model. Raises RequestError if it takes fewer pictures.

        ``has_strength``: the client gives a denoising strength.
        """
        start = {"image": self.pictures[0], "mask": self.mask}
        if Feature.REFERENCES in model.family.features_of(model.variant):
            return {"references": self.pictures} | (start if self.mask or has_strength else {})
        if len(self.pictures) > 1:
            problem = f"only one picture is supported: {model.name} does not edit by reference"
            raise RequestError("image", f"{len(self.pictures)} pictures", problem)
        return start


def _queue(control: Services, asked: ImageGeneration, edit: Edit | None, who: Person) -> list[QueuedJob]:
    asked.refuse_unknown()
    model = control.library.get(asked.model) if asked.model else intake.default_model(control)
    width, height = _size(asked.size)
    count = asked.n or 1
    values = {name: asked.asked(name) for name in ("steps", "cfg", "negative", "sampler", "schedule", "strength")}
    more = {} if edit is None else edit.fields(model, values["strength"] is not None)
    if values["strength"] is not None:
        if edit is None:
            raise RequestError("strength", values["strength"], "is only for edits, which start from a picture")
        more["strength"] = _number("strength", values["strength"])
    request = Request(
        prompt=asked.prompt,
        model=model.name,
        negative=values["negative"] or "",
        seed=intake.some_seed(count) if asked.seed is None else asked.seed,
        steps=_steps(asked, values["steps"]),
        width=width,
        height=height,
        cfg=None if values["cfg"] is None else _number("cfg", values["cfg"]),
        count=count,
        **_sampler(values["sampler"], values["schedule"]),
        **more,
    )
    # A stream reads the events of one job at a time, so it would miss the previews of the other parts.
    spread = not asked.stream
    return intake.accept(control, request, who=who, client=f"openai {asked.user or ''}".strip(), spread=spread)


def _steps(asked: ImageGeneration, given: Any) -> int | None:
    by_quality = QUALITY_STEPS.get(asked.quality or "")
    if given is None:
        return by_quality
    if by_quality is not None:
        raise RequestError("quality", asked.quality, "sets the number of steps, and steps is set too: leave one out")
    number = _number("steps", given)
    if not math.isfinite(number) or number != int(number):
        raise RequestError("steps", given, "must be a whole number")
    return int(number)


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise RequestError(name, value, "must be a number") from error


def _sampler(sampler: Any, schedule: Any) -> dict[str, Any]:
    """Read sampler and schedule, by Safelight's or A1111's names. Raises RequestError when one is unknown."""
    texts = (None if value is None else str(value) for value in (sampler, schedule))
    found = parse_sampler_and_schedule(*texts)
    return {"sampler": found[0], "schedule": found[1]}


def _size(size: str | None) -> tuple[int, int] | tuple[None, None]:
    """Return width and height; None for the model's own, or those of the picture that is edited."""
    if size is None or size == "auto":
        return None, None
    found = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", size)
    if found is None:
        raise RequestError("size", size, "must be WIDTHxHEIGHT in pixels, such as 512x512, or auto")
    return int(found[1]), int(found[2])


def _answer(control: Services, jobs: list[QueuedJob], asked: ImageGeneration, base: str) -> Images:
    job = next((job for job in jobs if job.state != "done"), jobs[0])
    if job.state != "done":
        raise of_job(job)
    form = asked.output_format or "png"
    quality = LOSSLESS if asked.output_compression is None else max(1, asked.output_compression)
    query = "" if form == "png" else f"?format={form}&quality={quality}"
    data: list[Datum] = []
    for image in (image for each in jobs for image in control.database.images.of_job(each.id)):
        if asked.as_base64:
            data.append(Datum(b64_json=_in_base64(control, asked, image)))
        else:
            data.append(Datum(url=f"{base}/api/v1/images/{image.id}/file{query}"))
    return Images(created=int(time.time()), data=data, model=job.request.model, model_digest=job.model_digest)


def _in_base64(control: Services, asked: ImageGeneration, image: StoredImage) -> str:
    """Return an image's file in base64, in the format that the client asked for."""
    file, form = control.gallery.path(image).read_bytes(), asked.output_format or "png"
    if form != "png":
        file = _convert(file, form, asked.output_compression, image.metadata)
    return base64.b64encode(file).decode()


def _convert(png: bytes, form: ImageFormat, compression: int | None, metadata: Mapping[str, Any]) -> bytes:
    """Convert a PNG file to JPEG or WebP, with the metadata. ``compression``: 0 to 100, the quality."""
    with PILImage.open(io.BytesIO(png)) as image:
        quality = LOSSLESS if compression is None else max(1, compression)
        return encode_picture(image.convert("RGB"), metadata, form, quality)
