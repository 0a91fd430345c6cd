"""What is asked for: frozen, and checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from safelight.errors import RequestError
from safelight.request import checks
from safelight.request.parts import MOST_CONTROLS, MOST_LORAS, Control, Embedding, Lora, each
from safelight.request.run_settings import PRECISIONS, Precision
from safelight.request.samplers import MOST_STEPS, SAMPLERS, Schedule

MOST_SEED = 2**32 - 1
MOST_PIXELS = 4096 * 4096
MOST_SIDE = 16384
MOST_COUNT = 1000

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
        object.__setattr__(self, "loras", each("loras", self.loras, Lora, MOST_LORAS))
        object.__setattr__(self, "controls", each("controls", self.controls, Control, MOST_CONTROLS))
        if self.embeddings is not None:
            object.__setattr__(self, "embeddings", each("embeddings", self.embeddings, Embedding, MOST_LORAS))
            words = [embedding.word for embedding in self.embeddings]
            twice = next((word for word in words if words.count(word) > 1), None)
            if twice is not None:
                raise RequestError("embeddings", twice, "is a word of two embeddings")
        checks.one_of("sampler", self.sampler, tuple(SAMPLERS))
        allowed = SAMPLERS[self.sampler].schedules
        if self.schedule not in allowed:
            problem = f"the sampler {self.sampler} has {', '.join(allowed)}"
            raise RequestError("schedule", self.schedule, problem)
        checks.one_of("precision", self.precision, PRECISIONS)
        checks.within("seed", self.seed, 0, MOST_SEED)
        checks.within("steps", self.steps, 1, MOST_STEPS)
        most = SAMPLERS[self.sampler].most_steps
        for name, steps in (("steps", self.steps), ("hires_steps", self.hires_steps)):
            if isinstance(steps, int) and steps > most:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise RequestError(name, steps, f"the sampler {self.sampler} has at most {most} steps")
        checks.within("count", self.count, 1, MOST_COUNT)
        checks.within("clip_skip", self.clip_skip, 0, 11)
        if not isinstance(self.cfg, (int, float)) or not 0 <= self.cfg <= 100:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise RequestError("cfg", self.cfg, "the guidance scale goes from 0 to 100")
        for name, value in (("width", self.width), ("height", self.height)):
            if value is not None:
                checks.within(name, value, 8, MOST_SIDE)
                if value % 8:
                    near = max(8, round(value / 8) * 8)
                    raise RequestError(name, value, f"must be a multiple of 8; the nearest is {near}")
        if (self.width or 0) * (self.height or 0) > MOST_PIXELS:
            raise RequestError("width", self.width, f"times height {self.height} is over {MOST_PIXELS} pixels")
        if self.seed + self.count - 1 > MOST_SEED:
            raise RequestError("count", self.count, f"seeds would pass {MOST_SEED}")
        for name in ("prompt", "negative", "model", "image", "mask", "vae", "text_encoder"):
            checks.text(name, getattr(self, name))
        checks.one_of("prompt_syntax", self.prompt_syntax, PROMPT_SYNTAXES)
        checks.one_of("seamless", self.seamless, SEAMLESS)
        self._check_image()
        self._check_passes()

    def _check_passes(self) -> None:
        checks.within("variation_seed", self.variation_seed, 0, MOST_SEED)
        checks.number("variation_strength", self.variation_strength, 0, 1, "")
        if self.variation_strength and self.variation_seed + self.count - 1 > MOST_SEED:
            raise RequestError("count", self.count, f"variation seeds would pass {MOST_SEED}")
        checks.number("hires_scale", self.hires_scale, 1, MOST_HIRES, "")
        checks.one_of("hires_upscaler", self.hires_upscaler, tuple(UPSCALERS))
        checks.share("hires_strength", self.hires_strength)
        checks.within("hires_steps", self.hires_steps, 0, MOST_STEPS)
        if self.hires_scale > 1 and self.image:
            raise RequestError("hires_scale", self.hires_scale, "is for images that start from noise")
        if self.hires_scale > 1 and int((self.hires_steps or self.steps) * self.hires_strength) < 1:
            raise RequestError("hires_strength", self.hires_strength, "of the steps is not one")
        if self.tile:
            checks.within("tile", self.tile, LEAST_TILE, MOST_SIDE)
            if self.seamless:
                raise RequestError("tile", self.tile, "and seamless: each tile would go on at its own other side")
            if self.tile % 64:
                raise RequestError("tile", self.tile, "must be a multiple of 64")

    def _check_image(self) -> None:
        checks.share("strength", self.strength)
        if not isinstance(self.outpaint, (tuple, list)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise RequestError("outpaint", self.outpaint, "must be four numbers of pixels: left, top, right, bottom")
        object.__setattr__(self, "outpaint", tuple(self.outpaint))
        if self.outpaint and len(self.outpaint) != 4:
            raise RequestError("outpaint", self.outpaint, "must be four numbers of pixels: left, top, right, bottom")
        for pixels in self.outpaint:
            checks.within("outpaint", pixels, 0, 4096)
        if not any(self.outpaint):
            object.__setattr__(self, "outpaint", ())
        if self.outpaint and (not self.image or self.mask):
            problem = "and a mask: give one of them" if self.mask else "there is no image that could be made larger"
            raise RequestError("outpaint", self.outpaint, problem)
        checks.within("mask_blur", self.mask_blur, 0, 256)
        if self.mask_padding is not None:
            checks.within("mask_padding", self.mask_padding, 0, 4096)
            if not self.masked:
                raise RequestError("mask_padding", self.mask_padding, "there is no mask that it could be around")
        if self.mask and not self.image:
            raise RequestError("mask", self.mask[:40], "there is no image that it could be of")
        if self.image and int(self.steps * self.strength) < 1:
            raise RequestError("strength", self.strength, f"of {self.steps} steps is not one")

    def for_image(self, index: int) -> Request:
        """The request for image ``index`` alone (it counts from 0): the only place that says how images of one request
        differ. With a variation strength only the variation seed moves, otherwise only the seed. Raises IndexError."""
        if not 0 <= index < self.count:
            raise IndexError(f"image {index} of {self.count}")
        if self.variation_strength:
            return replace(self, count=1, variation_seed=self.variation_seed + index)
        return replace(self, count=1, seed=self.seed + index)

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
        return bool(self.mask or self.outpaint)
