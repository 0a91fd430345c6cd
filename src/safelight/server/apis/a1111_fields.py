"""AUTOMATIC1111's fields, and their translation to a request. A field that Safelight does not support is an error."""

from __future__ import annotations

import base64
import io
from typing import Any, Literal

from PIL import Image as PILImage
from PIL import ImageFilter, ImageOps
from pydantic import BaseModel, ConfigDict, Field

from safelight.catalog.inputs import as_mask, decode_image
from safelight.errors import RequestError
from safelight.pipeline import sizes
from safelight.request.adapters import PREPROCESSORS, Control, ControlMode, Resize
from safelight.request.bounds import MOST_SIDE
from safelight.request.field import fields_of
from safelight.request.foreign_samplers import EVENLY
from safelight.request.samplers import SAMPLERS, SCHEDULE_LABELS, Schedule, sampler_by_name
from safelight.request.schema import Request
from safelight.request.values import UPSCALERS
from safelight.server.apis.a1111_neutral import FIELDS, OPTIONS, UNIT, refuse, refuse_script

AUTOMATIC = "Automatic"

SCHEDULES: dict[str, Schedule] = {label.lower(): ours for ours, label in SCHEDULE_LABELS.items()}
"""Safelight's schedules by A1111's schedule types."""


_MULTIPLE = 8
"""A1111's sizes are multiples of 8 pixels."""


class TextToImage(BaseModel):
    """A1111's fields that Safelight supports. Of its other fields, only the neutral values are allowed."""

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
    distilled_cfg_scale: float | None = Field(default=None, description="only models with distilled guidance read it")
    width: int | None = 512
    height: int | None = 512
    subseed: int | None = -1
    subseed_strength: float | None = Field(default=0, ge=0, le=1)
    tiling: bool | None = False
    enable_hr: bool | None = False
    hr_scale: float | None = 2.0
    hr_upscaler: str | None = "Latent"
    hr_second_pass_steps: int | None = Field(default=0, ge=0)
    hr_resize_x: int | None = Field(default=0, ge=0, le=MOST_SIDE)
    hr_resize_y: int | None = Field(default=0, ge=0, le=MOST_SIDE)
    denoising_strength: float | None = None
    clip_skip: int | None = Field(default=None, ge=1, le=12)
    refiner_checkpoint: str | None = None
    refiner_switch_at: float | None = None
    alwayson_scripts: dict[str, Any] | None = None
    override_settings: dict[str, Any] | None = None
    send_images: bool = True

    def given(self) -> dict[str, Any]:
        """Return fields of a request: ControlNets, seamless, hires fix.

        Raises RequestError when a value is not supported.
        """
        values: dict[str, Any] = {"controls": _controls(self.alwayson_scripts or {}, bool(self.enable_hr))}
        if self.tiling:
            values["seamless"] = "xy"
        if self.enable_hr:
            values |= self._high_resolution()
        return values

    def sides(self) -> tuple[int, int]:
        """Return width and height. Raises RequestError for sides that no image has."""
        found = self.width or 512, self.height or 512
        for name, side in zip(("width", "height"), found, strict=True):
            fields_of(Request)[name].check(side)
        return found

    def refiner(self) -> tuple[str, float] | None:
        """Return the title of the refiner and the share of the noise levels from which it computes; None without one.

        The script *Refiner* overrides the two fields, as in A1111. Raises RequestError for other arguments than its
        three: whether it is enabled, the title, and the share.
        """
        title, share = self.refiner_checkpoint, self.refiner_switch_at
        for name, script in (self.alwayson_scripts or {}).items():
            if name.lower() == REFINER_SCRIPT:
                values: Any = script.get("args", []) if isinstance(script, dict) else script
                if not values or not values[0]:
                    return None
                if not isinstance(values, list) or len(values) != 3:
                    raise RequestError("alwayson_scripts", name, "has three args: enabled, checkpoint, switch at")
                title, share = values[1], values[2]
        if title in (None, "", "None", "none") or share is None or (isinstance(share, int | float) and share >= 1):
            # With a share of 1, A1111 never switches.
            return None
        if isinstance(share, bool) or not isinstance(share, int | float):
            raise RequestError("refiner_switch_at", share, "must be a number")
        return str(title), float(share)

    def _high_resolution(self) -> dict[str, Any]:
        width, height = self.sides()
        scale = self.hr_scale or 2.0
        if self.hr_resize_x or self.hr_resize_y:
            scale = self.hr_resize_x / width if self.hr_resize_x else (self.hr_resize_y or 0) / height
            whole = tuple(sizes.enlarged(side, scale, _MULTIPLE) for side in (width, height))
            if (self.hr_resize_x or whole[0], self.hr_resize_y or whole[1]) != whole:
                problem = f"must be multiples of 8, in the aspect ratio of {width}x{height}"
                raise RequestError("hr_resize_y", f"{self.hr_resize_x}x{self.hr_resize_y}", problem)
        return {
            "hires_scale": scale,
            "hires_upscaler": _upscaler(self.hr_upscaler or "Latent"),
            "hires_steps": self.hr_second_pass_steps or 0,
            "hires_strength": 0.7 if self.denoising_strength is None else self.denoising_strength,
        }


def _upscaler(name: str) -> str:
    found = next((ours for ours, theirs in UPSCALERS.items() if name.lower() in (ours, theirs.lower())), None)
    if found is None:
        raise RequestError("hr_upscaler", name, f"must be one of {', '.join(UPSCALERS.values())}")
    return found


REFINER_SCRIPT = "refiner"
"""The title of A1111's script for the refiner, in lower case."""

CONTROL_MODES: dict[str, ControlMode] = {
    "balanced": "balanced",
    "0": "balanced",
    "my prompt is more important": "more_prompt",
    "1": "more_prompt",
    "controlnet is more important": "more_control",
    "2": "more_control",
}

BOTH_PASSES = ("both", "hiresfixoption.both", "0")

_UNIT = frozenset(
    {
        *("model", "module", "weight", "image", "input_image", "guidance_start", "guidance_end", "guidance"),
        *("control_mode", "threshold_a", "threshold_b", "resize_mode", "hr_option", "union_control_type"),
    }
)
"""The fields of a ControlNet unit that Safelight supports."""


def _controls(scripts: dict[str, Any], two_passes: bool) -> tuple[Control, ...]:
    """Read the units of the ControlNet extension.

    Raises RequestError when another script is enabled, or a unit is not valid.
    """
    for name, what in scripts.items():
        if name.lower() != "controlnet":
            refuse_script(name, what)
    given = [what for name, what in scripts.items() if name.lower() == "controlnet" and what]
    if len(given) > 1:
        raise RequestError("alwayson_scripts", "controlnet", f"is present {len(given)} times")
    units = (given[0].get("args") if isinstance(given[0], dict) else None) if given else []
    if not isinstance(units, list) or not all(isinstance(unit, dict) for unit in units):
        raise RequestError("alwayson_scripts", "controlnet", "args must be a list of units")
    return tuple(_control(unit, two_passes) for unit in units if unit.get("enabled", True))


def _control(unit: dict[str, Any], two_passes: bool) -> Control:
    for name, value in unit.items():
        if name not in _UNIT:
            refuse(UNIT, "controlnet.", name, value)
    if unit.get("guidance") not in (None, unit.get("guidance_end", unit.get("guidance"))):
        problem = "is another name of guidance_end, and the two differ"
        raise RequestError("controlnet.guidance", unit["guidance"], problem)
    image = unit.get("image") or unit.get("input_image") or ""
    if unit.get("input_image") not in (None, "", image):
        raise RequestError("controlnet.input_image", "", "is another name of image, and the two differ")
    if isinstance(image, dict):
        if image.get("mask"):
            raise RequestError("controlnet.image", "mask", "Safelight does not support masks for ControlNets yet")
        image = image.get("image", "")
    mode = CONTROL_MODES.get(str(unit.get("control_mode", "balanced")).lower())
    if mode is None:
        raise RequestError(
            "controlnet.control_mode", unit["control_mode"], f"must be one of {', '.join(CONTROL_MODES)}"
        )
    module = str(unit.get("module") or "none").lower()
    if module not in PREPROCESSORS:
        raise RequestError("controlnet.module", module, f"must be one of {', '.join(PREPROCESSORS)}")
    resolution = unit.get("processor_res")
    if module not in ("none", "invert") and resolution not in (None, -1, 64, 512):
        problem = f"{module} uses the picture's own size; leave it out, or send 512 or -1, which change nothing"
        raise RequestError("controlnet.processor_res", resolution, problem)
    if two_passes and str(unit.get("hr_option") or "both").lower() not in BOTH_PASSES:
        raise RequestError("controlnet.hr_option", unit["hr_option"], "Safelight uses a ControlNet in both passes")
    return Control(
        name=str(unit.get("model") or "").partition(" [")[0],
        image=_data(str(image)) if image else "",
        weight=unit.get("weight", 1.0),
        start=unit.get("guidance_start", 0.0),
        end=unit.get("guidance_end", unit.get("guidance") or 1.0),
        mode=mode,
        preprocessor=module,
        resize_mode=_resize(unit.get("resize_mode", 1)),
        low=_threshold(unit.get("threshold_a"), 100),
        high=_threshold(unit.get("threshold_b"), 200),
        union_type=_union_type(str(unit.get("union_control_type") or "")),
    )


def _union_type(label: str) -> str:
    """Return the type of picture that A1111's label stands for; "" for those that name none."""
    name = label.lower()
    return {"unknown": "", "all": "", "openpose": "pose"}.get(name, name)


RESIZES: dict[str, Resize] = {
    "0": "just_resize",
    "just resize": "just_resize",
    "scale to fit (inner fit)": "crop_resize",
    "1": "crop_resize",
    "crop and resize": "crop_resize",
    "inner fit (scale to fit)": "crop_resize",
    "2": "fill_resize",
    "3": "just_resize",
    "resize and fill": "fill_resize",
    "envelope (outer fit)": "fill_resize",
    "outer fit (shrink to fit)": "fill_resize",
}


def _resize(value: Any) -> Resize:
    found = RESIZES.get(str(value).lower())
    if found is None:
        raise RequestError("controlnet.resize_mode", value, f"must be one of {', '.join(RESIZES)}")
    return found


def _threshold(value: Any, default: int) -> int:
    """Read a threshold; a negative value is A1111's code for the default. Raises RequestError if it is not a number."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value != value):  # noqa: PLR0124
        raise RequestError("controlnet.threshold", value, "must be a number")
    return default if value is None or value < 0 else int(min(value, 1e6))


class ImageToImage(TextToImage):
    """A1111's fields for a request that starts from an image; ``init_images`` and ``mask`` are in base64."""

    init_images: list[str] = Field(min_length=1, max_length=1)
    mask: str | None = None
    denoising_strength: float | None = Field(default=0.75, gt=0, le=1)
    image_cfg_scale: float | None = None
    mask_blur: int | None = Field(default=None, ge=0, le=256)
    mask_blur_x: int | None = Field(default=None, ge=0, le=256)
    mask_blur_y: int | None = Field(default=None, ge=0, le=256)
    inpaint_full_res: bool = True
    inpaint_full_res_padding: int | None = Field(default=0, ge=0, le=4096)
    inpainting_mask_invert: Literal[0, 1] | bool = 0
    inpainting_fill: int = Field(
        default=0, ge=0, le=3, description="masked part: 0 the colours around it, 1 the image; 2 and 3 are refused"
    )
    resize_mode: int = Field(
        default=0, ge=0, le=3, description="0 just resize, 1 crop and resize, 2 resize and fill; 3 is refused"
    )
    include_init_images: bool = False

    def given(self) -> dict[str, Any]:
        """Return fields of a request, with the image and the mask. Raises RequestError when one is not an image."""
        if self.inpainting_fill > 1:
            problem = "fills the latents of the masked part; Safelight fills with colours (0) or keeps the image (1)"
            raise RequestError("inpainting_fill", self.inpainting_fill, problem)
        values = {**super().given(), "image": self._resized("init_images", self.init_images[0])}
        values["strength"] = 0.75 if self.denoising_strength is None else self.denoising_strength
        if self.image_cfg_scale:
            # A1111's documentation shows 0 for a field that is not set.
            values["image_cfg"] = self.image_cfg_scale
        if self.mask:
            mask = as_mask("mask", _bytes("mask", self._resized("mask", self.mask)))
            mask = ImageOps.invert(mask) if self.inpainting_mask_invert else mask
            if self.inpainting_fill == 0:
                values["image"] = _png(
                    filled(decode_image("init_images", _bytes("init_images", values["image"])), mask)
                )
            values |= {"mask": _png(mask), "mask_blur": self._blur()}
            values["mask_padding"] = (self.inpaint_full_res_padding or 0) if self.inpaint_full_res else None
        return values

    def _resized(self, field: str, picture: str) -> str:
        """Return a picture, fitted to the image's size as ``resize_mode`` says. Raises RequestError."""
        if self.resize_mode == 3:
            problem = "enlarges latents, which Safelight does not do with an input image; use 0, 1 or 2"
            raise RequestError("resize_mode", self.resize_mode, problem)
        # With "only masked", A1111 cuts out a part that has the right shape.
        if self.resize_mode == 0 or (self.mask and self.inpaint_full_res):
            return _data(picture)
        fit, sides = crop_and_resize if self.resize_mode == 1 else resize_and_fill, self.sides()
        # The mask keeps its transparency, which as_mask reads.
        opened = decode_image(field, _bytes(field, picture), transparent=field == "mask")
        return _png(fit(opened, *sides))

    def _blur(self) -> int:
        """Return the blur of the mask; as in A1111, ``mask_blur`` overrides the two other fields."""
        across, down = self.mask_blur_x, self.mask_blur_y
        if self.mask_blur is not None:
            return self.mask_blur
        if (4 if across is None else across) != (4 if down is None else down):
            problem = f"must equal mask_blur_x, {across}: Safelight blurs a mask equally in both directions"
            raise RequestError("mask_blur_y", down, problem)
        return 4 if across is None else across


def crop_and_resize(picture: PILImage.Image, width: int, height: int) -> PILImage.Image:
    """Cut the middle of a picture, in the shape of the size, and resize it; as A1111's ``images.resize_image``."""
    across = min(picture.width, picture.height * width / height)
    down = min(picture.height, picture.width * height / width)
    left, top = (picture.width - across) / 2, (picture.height - down) / 2
    return picture.resize((width, height), PILImage.Resampling.LANCZOS, (left, top, left + across, top + down))


def resize_and_fill(picture: PILImage.Image, width: int, height: int) -> PILImage.Image:
    """Resize a picture so that it fits within the size, and fill the rest with the colours of its edges."""
    wider = width / height > picture.width / picture.height
    across = max(1, picture.width * height // picture.height) if wider else width
    down = height if wider else max(1, picture.height * width // picture.width)
    whole = picture.resize((across, down), PILImage.Resampling.LANCZOS)
    left, top = width // 2 - across // 2, height // 2 - down // 2
    out = PILImage.new(picture.mode, (width, height))
    out.paste(whole, (left, top))
    edges = (
        ((0, 0, left, height), (0, 0, 1, down)),
        ((left + across, 0, width, height), (across - 1, 0, across, down)),
        ((0, 0, width, top), (0, 0, across, 1)),
        ((0, top + down, width, height), (0, down - 1, across, down)),
    )
    for (x, y, right, bottom), edge in edges:
        if right > x and bottom > y and (right - x, bottom - y) != (width, height):
            out.paste(whole.crop(edge).resize((right - x, bottom - y)), (x, y))
    return out


FILLS = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))
"""(radius in pixels, repetitions) of the blurs that spread colours into a mask, from A1111's ``masking.fill``."""


def filled(picture: PILImage.Image, mask: PILImage.Image) -> PILImage.Image:
    """Return the picture (RGB) with the surrounding colours in its masked part; the rest does not change."""
    mask = mask.resize(picture.size)
    outside = PILImage.new("RGBa", picture.size)
    outside.paste(picture.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask))
    out = PILImage.new("RGBA", picture.size)
    for radius, times in FILLS:
        blurred = outside.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            out.alpha_composite(blurred)
    return out.convert("RGB")


def _data(picture: str) -> str:
    return picture if picture.startswith("data:") else f"data:image/png;base64,{picture}"


def _bytes(field: str, picture: str) -> bytes:
    try:
        return base64.b64decode(picture.rpartition(",")[2], validate=True)
    except ValueError as error:
        raise RequestError(field, picture[:40], f"is not base64 ({error})") from error


def _png(picture: PILImage.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return _data(base64.b64encode(file.getvalue()).decode())


_NOTHING = (None, "", "None", "none", 0)
"""Values of the second pass's fields that mean: the same as in the first pass."""

_ANCESTRAL = frozenset({"euler_a", "dpm2_a", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"})
"""Samplers that add noise at each step. ``eta`` and ``s_noise`` scale it; Safelight supports only 1."""

_SECOND_PASS = {
    "hr_prompt": "prompt",
    "hr_negative_prompt": "negative_prompt",
    "hr_sampler_name": "sampler_name",
    "hr_scheduler": "scheduler",
    "hr_checkpoint_name": "",
    "hr_cfg": "cfg_scale",
}
"""A1111's own fields for the second pass, each with the field of the first pass that it must equal here."""

_SAME = ("use same sampler", "use same scheduler", "use same checkpoint")


def sampler_of(name: str, scheduler: str | None) -> tuple[str, Schedule]:
    """Return Safelight's sampler and schedule for A1111's sampler and schedule type.

    ``name`` may contain the schedule: older clients send ``DPM++ 2M Karras``.
    ``scheduler``: ``Automatic`` is A1111's default for the sampler. ``Simple`` and ``Normal`` spread the steps of a
    rectified flow evenly, as the default does; for other models see :func:`refuse_evenly`.
    Raises RequestError when one of them is unknown.
    """
    label = (scheduler or AUTOMATIC).lower().replace("_", " ")
    schedule: Schedule | None = "default" if label in EVENLY else SCHEDULES.get(label)
    if schedule is None and label != AUTOMATIC.lower():
        known = ", ".join((AUTOMATIC, *SCHEDULE_LABELS.values()))
        raise RequestError("scheduler", scheduler, f"must be one of {known}")
    found = sampler_by_name(name)
    if found is None:
        known = ", ".join(sampler.a1111 for _, sampler in SAMPLERS.usable())
        raise RequestError("sampler_name", name, f"must be one of {known}")
    return found[0], found[1] or schedule or SAMPLERS[found[0]].automatic


def refuse_evenly(scheduler: str | None, kind: str) -> None:
    """Raise RequestError for ``Simple`` and ``Normal`` with a model that is no rectified flow.

    There, they differ from all of Safelight's schedules. ``kind``: of the model's noise.
    """
    if (scheduler or "").lower() in EVENLY and kind != "flow":
        problem = "is only for rectified flows such as FLUX; choose Automatic, Uniform, Karras or SGM Uniform"
        raise RequestError("scheduler", scheduler, problem)


def refuse_unknown(asked: TextToImage) -> None:
    """Raise RequestError for a field or option that is unknown, or has a value that Safelight does not support."""
    sampler, _ = sampler_of(asked.sampler_name or asked.sampler_index or "Euler", asked.scheduler)
    for name, value in (asked.model_extra or {}).items():
        if name in _SECOND_PASS:
            of_first = getattr(asked, _SECOND_PASS[name], None)
            if asked.enable_hr and value not in (*_NOTHING, of_first) and str(value).lower() not in _SAME:
                raise RequestError(name, value, "the second pass uses the value of the first")
        elif name in ("eta", "s_noise"):
            if value is not None and value != _noise(name, sampler, value):
                problem = f"{SAMPLERS[sampler].a1111} supports only {_noise(name, sampler, value)}"
                raise RequestError(name, value, problem)
        else:
            refuse(FIELDS, "", name, value)
    override = asked.override_settings or {}
    for name, value in override.items():
        if name in OPTIONS_DONE or (name == "forge_additional_modules" and value == [override.get("sd_vae")]):
            continue
        refuse(OPTIONS, "override_settings.", name, value)


OPTIONS_DONE = frozenset({"sd_model_checkpoint", "CLIP_stop_at_last_layers", "sd_checkpoint_hash", "sd_vae"})
"""The options that Safelight supports."""


def _noise(name: str, sampler: str, value: object) -> object:
    """Return the only supported value for this sampler, or ``value`` itself if it has no effect."""
    if sampler in _ANCESTRAL:
        return 1
    return 0 if (name, sampler) == ("eta", "ddim") else value
