"""What is asked for, what is answered, and what is reported meanwhile: frozen values without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from safelight.errors import RequestError

Schedule = Literal["default", "karras", "exponential", "sgm_uniform"]
"""How a sampler's noise levels are spread over its steps."""

Precision = Literal["auto", "fp32", "bf16", "fp16"]
AttentionType = Literal["auto", "normal", "sliced", "torch-sdp", "xformers", "flash", "sage"]
SliceSize = Literal["auto", "balanced", "max", "1", "2", "3", "4", "5", "6", "7", "8"]

SCHEDULES: tuple[Schedule, ...] = ("default", "karras", "exponential", "sgm_uniform")
PRECISIONS: tuple[Precision, ...] = ("auto", "fp32", "bf16", "fp16")
MOST_SEED = 2**32 - 1
MOST_PIXELS = 4096 * 4096
MOST_SIDE = 16384
MOST_STEPS = 1000
MOST_COUNT = 1000


@dataclass(frozen=True, slots=True)
class Sampler:
    """A sampler: diffusers' scheduler class, its settings, the schedules that apply, and A1111's name for it."""

    scheduler: str
    a1111: str
    schedules: tuple[Schedule, ...] = SCHEDULES
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


_SPACED: tuple[Schedule, ...] = ("default", "sgm_uniform")

SAMPLERS: Mapping[str, Sampler] = {
    "ddim": Sampler("DDIMScheduler", "DDIM", _SPACED, {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": Sampler("DDPMScheduler", "DDPM", _SPACED, {"clip_sample": False}),
    "pndm": Sampler("PNDMScheduler", "PLMS", _SPACED, {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "lms": Sampler("LMSDiscreteScheduler", "LMS"),
    "euler": Sampler("EulerDiscreteScheduler", "Euler"),
    "euler_a": Sampler("EulerAncestralDiscreteScheduler", "Euler a", _SPACED),
    "heun": Sampler("HeunDiscreteScheduler", "Heun"),
    "dpm2": Sampler("KDPM2DiscreteScheduler", "DPM2"),
    "dpm2_a": Sampler("KDPM2AncestralDiscreteScheduler", "DPM2 a"),
    "dpmpp_2m": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M"),
    "dpmpp_2m_sde": Sampler(
        "DPMSolverMultistepScheduler", "DPM++ 2M SDE", settings={"algorithm_type": "sde-dpmsolver++"}
    ),
    "dpmpp_sde": Sampler("DPMSolverSDEScheduler", "DPM++ SDE"),
    "dpmpp_3m_sde": Sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 3M SDE",
        settings={"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
    ),
    "unipc": Sampler("UniPCMultistepScheduler", "UniPC"),
    "deis": Sampler("DEISMultistepScheduler", "DEIS"),
    "lcm": Sampler("LCMScheduler", "LCM", _SPACED, {"clip_sample": False}),
    "tcd": Sampler("TCDScheduler", "TCD", _SPACED, {"clip_sample": False}),
}


MOST_STRENGTH = 100.0
MOST_LORAS = 50


@dataclass(frozen=True, slots=True)
class Lora:
    """An adapter of weights for one request: LoRA and its kin. ``name``: in the library, or a path.

    ``unet`` and ``text_encoder``: strengths of their own there, None for ``strength``. ``blocks``: factors by block of
    the UNet, as sd-webui-lora-block-weight counts them: 17 or 26 for SD 1 and 2, 12 or 20 for SDXL; the first is for
    text encoders. ``digest``: the content that it must have, "" for any.
    Raises RequestError for a value that is not allowed.
    """

    name: str
    strength: float = 1.0
    unet: float | None = None
    text_encoder: float | None = None
    blocks: tuple[float, ...] = ()
    digest: str = ""

    def __post_init__(self) -> None:
        _named("loras", self.name)
        object.__setattr__(self, "blocks", tuple(self.blocks))
        for value in (self.strength, self.unet, self.text_encoder, *self.blocks):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)  # pyright: ignore[reportUnnecessaryIsInstance]
            if value is not None and not (number and abs(value) <= MOST_STRENGTH):
                problem = f"{self.name}: a strength goes from -{MOST_STRENGTH:.0f} to {MOST_STRENGTH:.0f}"
                raise RequestError("loras", value, problem)
        if len(self.blocks) not in (0, *BLOCK_COUNTS):
            counts = ", ".join(map(str, BLOCK_COUNTS))
            raise RequestError("loras", len(self.blocks), f"{self.name}: as many block weights as one of {counts}")

    def on(self, role: str) -> float:
        """Its strength on a component."""
        own = self.unet if role == "unet" else self.text_encoder
        return self.strength if own is None else own


BLOCK_COUNTS = (12, 17, 20, 26)

ControlMode = Literal["balanced", "more_prompt", "more_control", "unbalanced"]
"""InvokeAI's: ``more_prompt`` weakens the outer layers, ``more_control`` also leaves the negative prompt without the
picture, ``unbalanced`` does only that."""

CONTROL_MODES: tuple[ControlMode, ...] = ("balanced", "more_prompt", "more_control", "unbalanced")

PREPROCESSORS: Mapping[str, str] = {
    "none": "the picture is what the ControlNet reads already",
    "canny": "white edges on black (Canny 1986), by the thresholds low and high",
    "invert": "black for white: for drawings with dark lines",
    "lineart": "lines, by a difference of Gaussians",
    "scribble": "a thick drawing, by an extended difference of Gaussians (Winnemöller 2012)",
    "softedge": "soft edges (Scharr)",
    "grayscale": "without colours",
    "threshold": "white where it is at least low, else black",
    "blur": "blurred, by high hundredths of pixels",
    "color": "colours in squares of an eighth of the side",
}
"""What is made of a picture before a ControlNet is shown it, and what that is."""

Resize = Literal["just_resize", "crop_resize", "fill_resize"]
"""InvokeAI's ways to make a picture as large as what is drawn: stretched, cut, or with black around it."""

RESIZES: tuple[Resize, ...] = ("just_resize", "crop_resize", "fill_resize")

MOST_CONTROLS = 8


@dataclass(frozen=True, slots=True)
class Control:
    """A ControlNet for one request. ``name``: in the library, or a path. ``image``: the picture, as :class:`Request`
    takes images, made as large as what is drawn by ``resize_mode``; ``preprocessor``: what is made of it first
    (:data:`PREPROCESSORS`), by ``low`` and ``high``.

    ``weight`` times its output is added, from the share ``start`` of the steps to the share ``end``. ``digest``: the
    content that it must have, "" for any. Raises RequestError for a value that is not allowed.
    """

    name: str
    image: str
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: ControlMode = "balanced"
    preprocessor: str = "none"
    low: int = 100
    high: int = 200
    resize_mode: Resize = "just_resize"
    digest: str = ""

    def __post_init__(self) -> None:
        _named("controls", self.name)
        _text("controls", self.image)
        if not self.image:
            raise RequestError("controls", self.name, "has no picture")
        _number("controls", self.weight, -MOST_STRENGTH, MOST_STRENGTH, f"{self.name}: its weight")
        _number("controls", self.start, 0, 1, f"{self.name}: its start, a share of the steps,")
        _number("controls", self.end, 0, 1, f"{self.name}: its end, a share of the steps,")
        if self.start >= self.end:
            raise RequestError("controls", self.start, f"{self.name}: its start is not before its end {self.end}")
        _one_of("controls", self.mode, CONTROL_MODES)
        _one_of("controls", self.preprocessor, tuple(PREPROCESSORS))
        _one_of("controls", self.resize_mode, RESIZES)
        _within("controls", self.low, 0, 255)
        _within("controls", self.high, 1, 10000)


@dataclass(frozen=True, slots=True)
class Embedding:
    """A textual inversion for one request: ``word`` in a prompt stands for its vectors. ``name``: in the library, or a
    path; ``digest``: the content that it must have, "" for any."""

    name: str
    word: str
    digest: str = ""

    def __post_init__(self) -> None:
        _named("embeddings", self.name)
        _text("embeddings", self.word)
        if not self.word.strip():
            raise RequestError("embeddings", self.word, "must be a word of the prompt")


PromptSyntax = Literal["a1111", "compel"]
PROMPT_SYNTAXES: tuple[PromptSyntax, ...] = ("a1111", "compel")

Seamless = Literal["", "x", "y", "xy"]
SEAMLESS: tuple[Seamless, ...] = ("", "x", "y", "xy")

UPSCALERS: Mapping[str, str] = {
    "latent": "Latent",
    "latent-nearest": "Latent (nearest)",
    "latent-bicubic": "Latent (bicubic)",
    "lanczos": "Lanczos",
    "nearest": "Nearest",
}
"""How a first pass is enlarged for high-resolution fix: its latents, or its pixels. A1111's names beside ours."""

MOST_HIRES = 8.0
LEAST_TILE = 64


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt for one model; ``count`` images with consecutive seeds.

    ``width`` and ``height`` are pixels, multiples of 8; None takes the model's own size. ``cfg`` is the guidance scale;
    1 and below means none. ``clip_skip`` counts layers left out, as diffusers does (A1111 shows one more).
    ``isolate``: make it in a process that has never held another model; that changes no pixel. ``loras``: adapters over
    the model's weights, in any order; as dicts too. ``lenient``: tensors of theirs that fit nothing are left out.
    ``vae``: another VAE than the model's own, by a VAE's or a model's name or path; ``vae_digest``: its content.
    ``image``: what to start from, a path, ``data:image/png;base64,…`` or the digest of one that is kept; ``strength``,
    above 0 to 1, is the share of the steps that is done then; ``mask``: what of it is drawn anew (white), softened by
    ``mask_blur`` pixels; ``mask_padding``: draw only that part, with so many pixels around it, None for all of it;
    ``outpaint``: pixels (left, top, right, bottom) by which the image is made larger, drawn anew.
    ``controls``: ControlNets, as dicts too. ``embeddings``: textual inversions; None for those that a prompt names.
    ``text_encoder``: the model whose text encoders read the prompts, "" for its own; ``text_encoder_digest``: theirs.
    ``prompt_syntax``: AUTOMATIC1111's, or compel's (InvokeAI's). ``variation_strength``: the share, 0 to 1, of the
    noise of ``variation_seed`` that is mixed in; image *k* then has that seed + *k*, and ``seed`` itself.
    ``hires_scale``: high-resolution fix: what was drawn is enlarged by it (``hires_upscaler``), and drawn again from
    there, ``hires_strength`` of ``hires_steps`` steps (0 for ``steps``). ``tile``: pixels a side of the squares by
    which the VAE works, 0 for none, None for squares of 768 where an image has over 1536 times 1536 pixels and is not
    seamless.
    ``seamless``: axes along which the image continues on its other side.
    Raises RequestError, naming the field, for a value that is not allowed.
    """

    prompt: str
    model: str
    negative: str = ""
    seed: int = 0
    steps: int = 20
    width: int | None = None
    height: int | None = None
    cfg: float = 7.0
    sampler: str = "euler"
    schedule: Schedule = "default"
    count: int = 1
    clip_skip: int = 0
    precision: Precision = "auto"
    isolate: bool = False
    loras: tuple[Lora, ...] = ()
    lenient: bool = False
    vae: str = ""
    vae_digest: str = ""
    image: str = ""
    mask: str = ""
    strength: float = 0.75
    mask_blur: int = 4
    mask_padding: int | None = None
    outpaint: tuple[int, ...] = ()
    controls: tuple[Control, ...] = ()
    embeddings: tuple[Embedding, ...] | None = None
    text_encoder: str = ""
    text_encoder_digest: str = ""
    prompt_syntax: PromptSyntax = "a1111"
    variation_seed: int = 0
    variation_strength: float = 0.0
    hires_scale: float = 1.0
    hires_upscaler: str = "latent"
    hires_strength: float = 0.7
    hires_steps: int = 0
    tile: int | None = None
    seamless: Seamless = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "loras", _each("loras", self.loras, Lora, MOST_LORAS))
        object.__setattr__(self, "controls", _each("controls", self.controls, Control, MOST_CONTROLS))
        if self.embeddings is not None:
            object.__setattr__(self, "embeddings", _each("embeddings", self.embeddings, Embedding, MOST_LORAS))
            words = [embedding.word for embedding in self.embeddings]
            twice = next((word for word in words if words.count(word) > 1), None)
            if twice is not None:
                raise RequestError("embeddings", twice, "is a word of two embeddings")
        _one_of("sampler", self.sampler, tuple(SAMPLERS))
        allowed = SAMPLERS[self.sampler].schedules
        if self.schedule not in allowed:
            problem = f"the sampler {self.sampler} has {', '.join(allowed)}"
            raise RequestError("schedule", self.schedule, problem)
        _one_of("precision", self.precision, PRECISIONS)
        _within("seed", self.seed, 0, MOST_SEED)
        _within("steps", self.steps, 1, MOST_STEPS)
        _within("count", self.count, 1, MOST_COUNT)
        _within("clip_skip", self.clip_skip, 0, 11)
        if not isinstance(self.cfg, (int, float)) or not 0 <= self.cfg <= 100:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise RequestError("cfg", self.cfg, "the guidance scale goes from 0 to 100")
        for name, value in (("width", self.width), ("height", self.height)):
            if value is not None:
                _within(name, value, 8, MOST_SIDE)
                if value % 8:
                    near = max(8, round(value / 8) * 8)
                    raise RequestError(name, value, f"must be a multiple of 8; the nearest is {near}")
        if (self.width or 0) * (self.height or 0) > MOST_PIXELS:
            raise RequestError("width", self.width, f"times height {self.height} is over {MOST_PIXELS} pixels")
        if self.seed + self.count - 1 > MOST_SEED:
            raise RequestError("count", self.count, f"seeds would pass {MOST_SEED}")
        for name in ("prompt", "negative", "model", "image", "mask", "vae", "text_encoder"):
            _text(name, getattr(self, name))
        _one_of("prompt_syntax", self.prompt_syntax, PROMPT_SYNTAXES)
        _one_of("seamless", self.seamless, SEAMLESS)
        self._check_image()
        self._check_passes()

    def _check_passes(self) -> None:
        _within("variation_seed", self.variation_seed, 0, MOST_SEED)
        _number("variation_strength", self.variation_strength, 0, 1, "")
        if self.variation_strength and self.variation_seed + self.count - 1 > MOST_SEED:
            raise RequestError("count", self.count, f"variation seeds would pass {MOST_SEED}")
        _number("hires_scale", self.hires_scale, 1, MOST_HIRES, "")
        _one_of("hires_upscaler", self.hires_upscaler, tuple(UPSCALERS))
        _share("hires_strength", self.hires_strength)
        _within("hires_steps", self.hires_steps, 0, MOST_STEPS)
        if self.hires_scale > 1 and self.image:
            raise RequestError("hires_scale", self.hires_scale, "is for images that start from noise")
        if self.hires_scale > 1 and int((self.hires_steps or self.steps) * self.hires_strength) < 1:
            raise RequestError("hires_strength", self.hires_strength, "of the steps is not one")
        if self.tile:
            _within("tile", self.tile, LEAST_TILE, MOST_SIDE)
            if self.seamless:
                raise RequestError("tile", self.tile, "and seamless: each tile would go on at its own other side")
            if self.tile % 64:
                raise RequestError("tile", self.tile, "must be a multiple of 64")

    def _check_image(self) -> None:
        _share("strength", self.strength)
        if not isinstance(self.outpaint, (tuple, list)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise RequestError("outpaint", self.outpaint, "must be four numbers of pixels: left, top, right, bottom")
        object.__setattr__(self, "outpaint", tuple(self.outpaint))
        if self.outpaint and len(self.outpaint) != 4:
            raise RequestError("outpaint", self.outpaint, "must be four numbers of pixels: left, top, right, bottom")
        for pixels in self.outpaint:
            _within("outpaint", pixels, 0, 4096)
        if any(self.outpaint) and (not self.image or self.mask):
            raise RequestError("outpaint", self.outpaint, "is for an image without a mask")
        _within("mask_blur", self.mask_blur, 0, 256)
        if self.mask_padding is not None:
            _within("mask_padding", self.mask_padding, 0, 4096)
        if self.mask and not self.image:
            raise RequestError("mask", self.mask[:40], "there is no image that it could be of")
        if self.image and int(self.steps * self.strength) < 1:
            raise RequestError("strength", self.strength, f"of {self.steps} steps is not one")

    @property
    def first_steps(self) -> int:
        """How many of the steps are computed in the first pass."""
        return min(self.steps, int(self.steps * self.strength)) if self.image else self.steps

    @property
    def steps_done(self) -> int:
        """How many of the steps are computed, in both passes."""
        again = int((self.hires_steps or self.steps) * self.hires_strength) if self.hires_scale > 1 else 0
        return self.first_steps + again

    @property
    def masked(self) -> bool:
        """Whether only a part is drawn anew."""
        return bool(self.mask) or any(self.outpaint)


Part = TypeVar("Part", Lora, Control, Embedding)


def _each(field_name: str, values: Any, kind: type[Part], most: int) -> tuple[Part, ...]:
    """As they were given, or as JSON has them."""
    if not isinstance(values, (list, tuple)):
        raise RequestError(field_name, values, "must be a list")
    listed = cast("list[Any]", values)
    if len(listed) > most:
        raise RequestError(field_name, len(listed), f"at most {most} at once")
    try:
        return tuple(value if isinstance(value, kind) else kind(**value) for value in listed)
    except TypeError as error:
        known = ", ".join(one.name for one in fields(kind))
        raise RequestError(field_name, values, f"each has {known} ({error})") from error


def _named(field_name: str, name: object) -> None:
    if not isinstance(name, str) or not name or "\0" in name or not _encodes(name):
        raise RequestError(field_name, name, "must be a name or a path")


def _text(field_name: str, text: object) -> None:
    if not isinstance(text, str) or "\0" in text or not _encodes(text):
        raise RequestError(field_name, text, "must be text without zero characters")


def _number(field_name: str, value: object, low: float, high: float, what: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(field_name, value, f"{what} must be a number from {low:g} to {high:g}".strip())


def _share(field_name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1:
        raise RequestError(field_name, value, "must be above 0, and at most 1")


def _encodes(text: str) -> bool:
    """False for half of a surrogate pair, which no file and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _one_of(field_name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RequestError(field_name, value, f"must be one of {', '.join(allowed)}")


def _within(field_name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(field_name, value, f"must be a whole number from {low} to {high}")


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Everything besides the request that can change a pixel; decided before the job, recorded with the image.

    ``dtype`` is that of text encoders and UNet, ``vae_dtype`` the VAE's. ``attention`` is a kernel's name,
    ``attention_slice_size`` says how many heads ``sliced`` computes at once. ``versions`` names the libraries that
    compute; ``hardware`` the processor or GPU and its instruction set: kernels for another one may round otherwise.
    """

    device: str
    hardware: str
    dtype: str
    vae_dtype: str
    attention: str
    threads: int
    versions: Mapping[str, str]
    attention_slice_size: str = "auto"


@dataclass(frozen=True, slots=True)
class Seconds:
    """Where an image's time went, in seconds. ``switch``: making the model's weights resident and binding them;
    ``gates``: looking at what was computed, which is part of the other stages."""

    switch: float
    encode: float
    denoise: float
    decode: float
    gates: float = 0.0

    @property
    def total(self) -> float:
        return self.switch + self.encode + self.denoise + self.decode


@dataclass(frozen=True, slots=True)
class Repair:
    """What was wrong while an image was made, and what helped. ``suspect``: which of the usual ones it was."""

    suspect: Literal["loading", "state", "attention", "memory", "numbers"]
    wrong: str
    helped: str


Stage = Literal["switch", "encode", "denoise", "decode"]


@dataclass(frozen=True, slots=True)
class Preview:
    """What an unfinished image looks like: raw RGB bytes, row by row, a pixel for each latent."""

    pixels: bytes
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Progress:
    """What a generation reports: its ``stage``, and how far it is; ``image`` counts from 0.

    ``memory``: what is where at the beginning and end of stages (what :meth:`LocalEngine.memory` gives), else None.
    ``preview``: after a step.
    """

    stage: Stage
    image: int
    step: int
    steps: int
    memory: Mapping[str, Any] | None = None
    preview: Preview | None = None


OnProgress = Callable[[Progress], None]
"""Called in the thread that computes; may raise :class:`safelight.Cancelled` to stop the job."""


@dataclass(frozen=True, slots=True)
class Image:
    """A finished image. ``pixels``: raw RGB bytes, row by row. ``metadata``: what the file's ``safelight`` chunk holds.

    ``host_peak_bytes``: the largest resident set of the process so far. ``path``: where it was saved, None if nowhere.
    ``warnings``: what the user should know, such as a prompt that was cut.
    """

    pixels: bytes
    width: int
    height: int
    seed: int
    model: str
    model_digest: str
    pixels_sha256: str
    seconds: Seconds
    host_peak_bytes: int
    metadata: Mapping[str, Any]
    path: Path | None = None
    warnings: tuple[str, ...] = ()
