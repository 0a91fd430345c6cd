"""What Safelight's own API takes and answers, in its fields."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from safelight.jobs.job import State
from safelight.request.parts import MOST_CONTROLS, MOST_LORAS, MOST_STRENGTH, PREPROCESSORS, ControlMode, Resize
from safelight.request.run_settings import Precision
from safelight.request.samplers import MOST_STEPS, SAMPLERS, Schedule
from safelight.request.schema import (
    MOST_COUNT,
    MOST_HIRES,
    MOST_SEED,
    MOST_SIDE,
    UPSCALERS,
    PromptSyntax,
    Seamless,
)


class LoraModel(BaseModel):
    """An adapter over the model's weights, by its name in the library; strengths of its own for the UNet and the text
    encoders; factors by block of the UNet (17 or 26 of them, 12 or 20 for SDXL); the content that it must have."""

    model_config = ConfigDict(extra="forbid")

    name: str
    strength: float = Field(default=1.0, ge=-MOST_STRENGTH, le=MOST_STRENGTH)
    unet: float | None = Field(default=None, ge=-MOST_STRENGTH, le=MOST_STRENGTH)
    text_encoder: float | None = Field(default=None, ge=-MOST_STRENGTH, le=MOST_STRENGTH)
    blocks: list[float] = Field(default_factory=list[float], max_length=26)
    digest: str = ""


class ControlModel(BaseModel):
    """A ControlNet, by its name in the library, and its picture; ``weight`` times its output counts from the share
    ``start`` of the steps to ``end``; what is made of the picture first; the content that it must have."""

    model_config = ConfigDict(extra="forbid")

    name: str
    image: str = Field(description="data:image/png;base64,… or a digest")
    weight: float = Field(default=1.0, ge=-MOST_STRENGTH, le=MOST_STRENGTH)
    start: float = Field(default=0.0, ge=0, le=1)
    end: float = Field(default=1.0, ge=0, le=1)
    mode: ControlMode = "balanced"
    preprocessor: str = Field(default="none", description=", ".join(PREPROCESSORS))
    low: int = Field(default=100, ge=0, le=255)
    high: int = Field(default=200, ge=1, le=10000)
    resize_mode: Resize = "just_resize"
    digest: str = ""


class EmbeddingModel(BaseModel):
    """A textual inversion, by its name in the library, and the word of a prompt that stands for it."""

    model_config = ConfigDict(extra="forbid")

    name: str
    word: str
    digest: str = ""


class AdapterModel(BaseModel):
    """An adapter of the library. ``base``: which checkpoints it is for, empty where nothing tells. Sizes are bytes."""

    name: str
    kind: str
    base: str
    dtype: str
    digest: str
    bytes: int


class Generation(BaseModel):
    """What to draw. Sizes are pixels, multiples of 8; the model's own by default. Without a seed one is chosen."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    model: str
    negative: str = ""
    seed: int | None = Field(default=None, ge=0, le=MOST_SEED)
    steps: int = Field(default=20, ge=1, le=MOST_STEPS)
    width: int | None = Field(default=None, ge=8, le=MOST_SIDE)
    height: int | None = Field(default=None, ge=8, le=MOST_SIDE)
    cfg: float = Field(default=7.0, ge=0, le=100)
    sampler: str = Field(default="euler", description=", ".join(SAMPLERS))
    schedule: Schedule = "default"
    count: int = Field(default=1, ge=1, le=MOST_COUNT)
    clip_skip: int = Field(default=0, ge=0, le=11)
    precision: Precision = "auto"
    isolate: bool = Field(default=False, description="make it in a process that has never held another model")
    loras: list[LoraModel] = Field(default_factory=list[LoraModel], max_length=MOST_LORAS)
    vae: str = Field(default="", description="another VAE than the model's own: its name, or a model's")
    vae_digest: str = Field(default="", description="the content that it must have")
    image: str = Field(default="", description="what to start from: data:image/png;base64,… or a digest")
    mask: str = Field(default="", description="what of the image is drawn anew (white), in the same form")
    strength: float = Field(default=0.75, gt=0, le=1, description="the share of the steps that is done, with an image")
    mask_blur: int = Field(default=4, ge=0, le=256, description="pixels")
    mask_padding: int | None = Field(default=None, ge=0, le=4096, description="draw only the masked part; pixels")
    outpaint: list[int] = Field(default_factory=list[int], max_length=4, description="left, top, right, bottom: pixels")
    controls: list[ControlModel] = Field(default_factory=list[ControlModel], max_length=MOST_CONTROLS)
    embeddings: list[EmbeddingModel] | None = Field(
        default=None, max_length=MOST_LORAS, description="textual inversions; by default those that a prompt names"
    )
    text_encoder: str = Field(default="", description="the model whose text encoders read the prompts")
    text_encoder_digest: str = Field(default="", description="the content that they must have")
    prompt_syntax: PromptSyntax = "a1111"
    variation_seed: int = Field(default=0, ge=0, le=MOST_SEED)
    variation_strength: float = Field(default=0.0, ge=0, le=1, description="the share of the other seed's noise")
    hires_scale: float = Field(default=1.0, ge=1, le=MOST_HIRES, description="high-resolution fix")
    hires_upscaler: str = Field(default="latent", description=", ".join(UPSCALERS))
    hires_strength: float = Field(default=0.7, gt=0, le=1)
    hires_steps: int = Field(default=0, ge=0, le=MOST_STEPS, description="0: as many as steps")
    tile: int | None = Field(
        default=None, ge=0, le=MOST_SIDE, description="pixels a side; the VAE works by such squares"
    )
    seamless: Seamless = Field(default="", description="axes along which the image continues on its other side")
    lenient: bool = Field(default=False, description="leave out what of an adapter fits nothing in the model")
    priority: int = Field(default=0, ge=-100, le=100, description="higher goes first, within the queue's bound")


class JobModel(BaseModel):
    """A job. Times are seconds since 1970."""

    id: str
    number: int
    state: State
    model: str
    model_digest: str
    request: dict[str, Any]
    client: str
    priority: int
    created: float
    started: float | None
    ended: float | None
    attempts: int
    images: int
    overtaken: int
    reason: str
    failure: str = Field(description="of a failed job: input, failed, device, storage or worker")


class ImageModel(BaseModel):
    """A finished image."""

    id: str
    job: str
    place: int
    width: int
    height: int
    seed: int
    model: str
    model_digest: str
    pixels_sha256: str
    created: float
    metadata: dict[str, Any]
    url: str
    thumbnail: str


class Place(BaseModel):
    """A waiting job, and why it is at its place."""

    job: JobModel
    reason: str


class Queue(BaseModel):
    """``running`` and the waiting jobs, in the order in which they will be started if nothing else comes."""

    running: JobModel | None
    progress: dict[str, Any] | None
    waiting: list[Place]


class ModelModel(BaseModel):
    """A model of the library. ``bytes``: of its weights."""

    name: str
    kind: str
    base: str
    variant: str
    prediction_type: str
    dtype: str
    digest: str
    origin: str
    rule: str
    format: str
    resolution: int
    bytes: int
    pinned: bool


class Adding(BaseModel):
    """A checkpoint on the server's disk, in one of the folders that ``model_folders`` allows."""

    model_config = ConfigDict(extra="forbid")

    path: str
    name: str | None = None
    prediction_type: Literal["epsilon", "v_prediction"] | None = None


class Verified(BaseModel):
    """``ok``: all bytes are those of the model's manifest, else ``problem`` says which are not."""

    ok: bool
    problem: str = ""


class Cancelled(BaseModel):
    """``cancelled``: it had not ended."""

    cancelled: bool


class Checked(BaseModel):
    """``pixels_sha256``: of the image that the new process made."""

    same: bool
    pixels_sha256: str


class Resident(BaseModel):
    """The digests of models that are whole in memory, the last used first."""

    resident: list[str]


class Health(BaseModel):
    """``status``: waiting when the queue cannot go on, for the ``problem``; ``worker``: ready, or starting. The rest is
    told to those only who may use the server."""

    status: Literal["ok", "waiting"]
    worker: Literal["ready", "starting"]
    problem: str = ""
    version: str | None = None
    spare: bool | None = None
    restarts: int | None = None
    run: dict[str, Any] | None = None
