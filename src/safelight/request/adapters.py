"""What a request puts over or beside a model: adapters of weights, ControlNets, textual inversions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Annotated, Any, Literal, TypeVar, cast

from safelight import extras
from safelight.errors import RequestError
from safelight.extensions import Extensible, function
from safelight.request import checks
from safelight.request.field import FieldDeclaration, fields_of


class Purpose(StrEnum):
    """What a component of a model is for."""

    TEXT_ENCODER = "text encoder"
    VISION_ENCODER = "vision encoder"
    DENOISER = "denoiser"
    VAE = "VAE"
    CONTROL = "control"


MOST_STRENGTH = 100.0
MOST_LORAS = 50


@dataclass(frozen=True, slots=True)
class Lora:
    """An adapter of weights for one request: LoRA or relative. Raises RequestError for a value that is not allowed.

    ``name``: its name in the library, or a path.
    ``unet``, ``text_encoder``: the strength for the UNet and for the text encoders; None: use ``strength``.
    ``blocks``: factors by block of the UNet, as sd-webui-lora-block-weight counts them: 17 or 26 for SD 1 and 2, 12 or
    20 for SDXL; the first is for the text encoders.
    ``digest``: the digest that the adapter must have; "" for any.
    """

    name: Annotated[str, FieldDeclaration(help="The name of an adapter in the library.")]
    strength: Annotated[
        float, FieldDeclaration(help="The strength.", minimum=-MOST_STRENGTH, maximum=MOST_STRENGTH)
    ] = 1.0
    unet: Annotated[
        float | None,
        FieldDeclaration(help="Another strength for the UNet.", minimum=-MOST_STRENGTH, maximum=MOST_STRENGTH),
    ] = None
    text_encoder: Annotated[
        float | None,
        FieldDeclaration(help="Another strength for the text encoders.", minimum=-MOST_STRENGTH, maximum=MOST_STRENGTH),
    ] = None
    blocks: Annotated[
        tuple[float, ...],
        FieldDeclaration(
            help="A list of factors: the first for the text encoders, then one for each block of the UNet; 17 or 26 in"
            " all, for SDXL 12 or 20.",
            maximum=26,
        ),
    ] = ()
    digest: Annotated[str, FieldDeclaration(help="The digest that the adapter must have; empty for any.")] = ""

    def __post_init__(self) -> None:
        checks.check_name("loras", self.name)
        object.__setattr__(self, "blocks", tuple(self.blocks))
        for value in (self.strength, self.unet, self.text_encoder, *self.blocks):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)  # pyright: ignore[reportUnnecessaryIsInstance]
            if value is not None and not (number and abs(value) <= MOST_STRENGTH):
                problem = f"{self.name}: a strength goes from -{MOST_STRENGTH:.0f} to {MOST_STRENGTH:.0f}"
                raise RequestError("loras", value, problem)
        if len(self.blocks) not in (0, *BLOCK_COUNTS):
            counts = f"{', '.join(map(str, BLOCK_COUNTS[:-1]))} or {BLOCK_COUNTS[-1]}"
            raise RequestError("loras", self.name, f"has {len(self.blocks)} block weights; it must have {counts}")

    def strength_for(self, purpose: Purpose) -> float:
        """Return the strength for components of a purpose."""
        own = self.unet if purpose is Purpose.DENOISER else self.text_encoder
        return self.strength if own is None else own


BLOCK_COUNTS = (12, 17, 20, 26)

ControlMode = Literal["balanced", "more_prompt", "more_control", "unbalanced"]
"""InvokeAI's control modes.

``more_prompt``: weakens the outer layers.
``unbalanced``: the ControlNet applies only to the positive prompt.
``more_control``: both.
"""

CONTROL_MODES: tuple[ControlMode, ...] = ("balanced", "more_prompt", "more_control", "unbalanced")

_PREPROCESSORS: Mapping[str, str] = {
    "none": "the picture is what the ControlNet reads already",
    "canny": "white edges on black (Canny 1986), by the thresholds `low` and `high`",
    "invert": "swaps black and white, for drawings with dark lines on white",
    "lineart": "lines, by a difference of Gaussians",
    "scribble": "a thick drawing, by an extended difference of Gaussians (Winnemöller 2012)",
    "softedge": "soft edges (Scharr)",
    "grayscale": "without colours",
    "threshold": "white where it is at least `low`, else black",
    "blur": "blurred, with a radius (Gaussian sigma) of `high` / 100 pixels",
    "color": "colours in squares of an eighth of the side",
}

PREPROCESSOR_GROUP = "safelight.preprocessors"


def _described(given: Any) -> str:
    """Return the first line of a function's documentation. Raises TypeError for anything but a function."""
    return (function(given).__doc__ or "").strip().partition("\n")[0]


PREPROCESSORS: Extensible[str] = Extensible(_PREPROCESSORS, PREPROCESSOR_GROUP, _described)
"""The preprocessors for ControlNet pictures, by name, each with a description."""

_WITHOUT_OPENCV = frozenset({"none", "invert"})


def require_preprocessor(name: str) -> None:
    """Raise MissingExtraError if a built-in preprocessor needs OpenCV, and it is not installed."""
    if name in PREPROCESSORS.builtin and name not in _WITHOUT_OPENCV:
        extras.require("preprocess", f"the preprocessor {name}")


Resize = Literal["just_resize", "crop_resize", "fill_resize"]
"""InvokeAI's ways to fit a picture to the size of the output image: stretch it, crop it, or pad it with black."""

RESIZES: tuple[Resize, ...] = ("just_resize", "crop_resize", "fill_resize")
MOST_CONTROLS = 8

CONTROLS_HELP = (
    "ControlNets, each with a picture. On the command line: NAME:IMAGE, followed by options:"
    " edges:in.png:pre=canny:weight=0.8:start=0:end=0.6:mode=more_prompt."
    f" pre: {', '.join(PREPROCESSORS.builtin)}. low= and high= are the preprocessor's thresholds (canny: both;"
    " threshold: low; blur: high, in hundredths of a pixel)."
    f" resize: {', '.join(RESIZES)}. mode: {', '.join(CONTROL_MODES)}. type: what the picture shows, for a Union"
    " (canny, depth, …). Repeat for several."
)
"""The help of a request's ``controls``."""


@dataclass(frozen=True, slots=True)
class Control:
    """A ControlNet for one request. Raises RequestError for a value that is not allowed.

    Its output, times ``weight``, is added from step ``start`` x steps to step ``end`` x steps.

    ``name``: its name in the library, or a path.
    ``image``: the control picture, in the same form as ``Request.image``.
    ``preprocessor``: a key of :data:`PREPROCESSORS`, applied to the picture first; ``low`` and ``high`` are its
    thresholds.
    ``resize_mode``: how the picture is fitted to the size of the output image.
    ``digest``: the digest that the ControlNet must have; "" for any.
    ``union_type``: the type of the picture, for a union of ControlNets; "" for the preprocessor's name.
    """

    name: Annotated[str, FieldDeclaration(help="The name of a ControlNet in the library.")]
    image: Annotated[
        str, FieldDeclaration(help="The picture: data:image/png;base64,… or the digest of a stored image.")
    ]
    weight: Annotated[
        float, FieldDeclaration(help="A factor for the output.", minimum=-MOST_STRENGTH, maximum=MOST_STRENGTH)
    ] = 1.0
    start: Annotated[float, FieldDeclaration(help="It starts at this share of the steps.", minimum=0, maximum=1)] = 0.0
    end: Annotated[float, FieldDeclaration(help="It ends at this share of the steps.", minimum=0, maximum=1)] = 1.0
    mode: Annotated[
        ControlMode,
        FieldDeclaration(
            help="balanced: the same effect everywhere. more_prompt: the ControlNet's outer layers have less effect."
            " unbalanced: the ControlNet does not change the prediction for the negative prompt. more_control: the last"
            " two together."
        ),
    ] = "balanced"
    preprocessor: Annotated[
        str,
        FieldDeclaration(help="The preprocessor to apply to the picture first.", values=PREPROCESSORS),
    ] = "none"
    low: Annotated[int, FieldDeclaration(help="The preprocessor's lower threshold.", minimum=0, maximum=255)] = 100
    high: Annotated[int, FieldDeclaration(help="The preprocessor's upper threshold.", minimum=1, maximum=10000)] = 200
    resize_mode: Annotated[Resize, FieldDeclaration(help="How to fit the picture to the size of the image.")] = (
        "just_resize"
    )
    digest: Annotated[str, FieldDeclaration(help="The digest that the ControlNet must have; empty for any.")] = ""
    union_type: Annotated[
        str,
        FieldDeclaration(
            help="For a ControlNet that reads several types of pictures (Union): the type of this one, such as canny,"
            " depth or pose. Empty: the preprocessor's name."
        ),
    ] = ""

    def __post_init__(self) -> None:
        checks.check_name("controls", self.name)
        checks.text("controls", self.image)
        checks.text("controls", self.union_type)
        if not self.image:
            raise RequestError("controls", self.name, "has no picture")
        fields = fields_of(Control)
        for name, what in (
            ("weight", "its weight"),
            ("start", "its start, a share of the steps,"),
            ("end", "its end, a share of the steps,"),
            ("mode", "its mode"),
            ("preprocessor", "its preprocessor"),
            ("resize_mode", "its resize mode"),
            ("low", ""),
            ("high", ""),
        ):
            fields[name].check(getattr(self, name), "controls", f"{self.name}: {what}")
        if self.start >= self.end:
            raise RequestError("controls", self.start, f"{self.name}: its start is not before its end {self.end}")


@dataclass(frozen=True, slots=True)
class Embedding:
    """A textual inversion for one request: ``word`` in a prompt stands for its vectors. ``name``: in the library, or a
    path; ``digest``: the content that it must have, "" for any."""

    name: Annotated[str, FieldDeclaration(help="The name of a textual inversion in the library.")]
    word: Annotated[str, FieldDeclaration(help="The word in a prompt that stands for the inversion.")]
    digest: Annotated[str, FieldDeclaration(help="The digest that the inversion must have; empty for any.")] = ""

    def __post_init__(self) -> None:
        checks.check_name("embeddings", self.name)
        checks.text("embeddings", self.word)
        if not self.word.strip():
            raise RequestError("embeddings", self.word, "must be a word of the prompt")


Item = TypeVar("Item", Lora, Control, Embedding)


def parse_items(field_name: str, values: Any, kind: type[Item], most: int) -> tuple[Item, ...]:
    """Return the items as ``kind`` objects; dicts (from JSON) are converted. Raises RequestError."""
    if not isinstance(values, (list, tuple)):
        raise RequestError(field_name, values, "must be a list")
    listed = cast("list[Any]", values)
    if len(listed) > most:
        raise RequestError(field_name, len(listed), f"at most {most} at once")
    try:
        return tuple(value if isinstance(value, kind) else kind(**value) for value in listed)
    except TypeError as error:
        known = ", ".join(one.name for one in fields(kind))
        raise RequestError(field_name, values, f"each item may have only the keys {known} ({error})") from error
