"""The parts of the form that most images do not need: pictures, ControlNets, hires fix, variations, components."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from nicegui import ui

from safelight.assembly.services import Services
from safelight.families.family import CONTROLNET
from safelight.request.adapters import CONTROL_MODES, PREPROCESSORS, RESIZES, Control
from safelight.request.bounds import MOST_REFERENCES
from safelight.request.values import PROMPT_SYNTAXES, SEAMLESS, UPSCALERS
from safelight.server.page.picture_field import PictureField, PictureList
from safelight.weights.adapter_file import VAE

OWN = "the model's own"
NONE = "none"


@contextmanager
def section(label: str) -> Generator[ui.expansion]:
    """Create a section of the form that the user can open; elements of the context go into it."""
    opened = ui.expansion(label).props('dense header-class="sl-quiet"').classes("w-full")
    with opened:
        yield opened


def number(label: str, value: float | None, low: float = 0, high: float | None = None, step: float = 0.05) -> ui.number:
    """Create a field for a number."""
    return ui.number(label, value=value, min=low, max=high, step=step).props("outlined dense")


class Further:
    """The further fields of a request; :meth:`values` returns them."""

    def __init__(self, serving: Services) -> None:
        names: dict[str, list[str]] = {VAE: [], CONTROLNET: []}
        for adapter in serving.catalog.adapters.cards():
            names.setdefault(adapter.kind, []).append(adapter.name)
        models = [card.name for card in serving.library.cards()]
        self._serving = serving
        self._others: tuple[Control, ...] = ()
        self._from_image(serving)
        self._controls(serving, names[CONTROLNET])
        with section("Hires fix, variations"), ui.element("div").classes("sl-pair"):
            self._hires = number("Hires scale", 1.0, 1, 8, 0.25)
            self._upscaler = ui.select(dict(UPSCALERS), label="Hires upscaler", value="latent").props("outlined dense")
            self._again = number("Hires strength", 0.7, 0.01, 1)
            self._steps = number("Hires steps (0 = same)", 0, 0, step=1)
            self._seamless = ui.select(
                {axes: axes or "no" for axes in SEAMLESS}, label="Seamless", value=""
            ).props("outlined dense")  # fmt: skip
            self._variation = number("Variation seed", 0, 0, step=1)
            self._share = number("Variation strength", 0.0, 0, 1)
            self._tile = number("VAE tile, pixels", None, 0, step=64)
        with section("Other components"):
            self._vae = ui.select([OWN, *names[VAE], *models], label="VAE", value=OWN).props("outlined dense")
            self._encoder = ui.select([OWN, *models], label="Text encoder", value=OWN).props("outlined dense")
            with ui.element("div").classes("sl-pair"):
                self._refiner = ui.select([NONE, *models], label="Refiner", value=NONE).props("outlined dense")
                self._refiner_start = number("Refiner from", 0.8, 0.01, 0.99)
            self._syntax = ui.select(list(PROMPT_SYNTAXES), label="Prompt syntax", value="a1111").props(
                "outlined dense"
            )
            self._lenient = ui.checkbox("Leave out adapter tensors that fit no weight")

    def _from_image(self, serving: Services) -> None:
        with section("From an image") as self._image_section:
            self._image = PictureField(serving, "image", "Image")
            self._mask = PictureField(serving, "mask", "Mask")
            self._references = PictureList(serving, "references", "Reference image", MOST_REFERENCES)
            with ui.element("div").classes("sl-pair"):
                self._strength = number("Denoising strength", 0.75, 0.01, 1)
                self._blur = number("Mask blur", 4, 0, 256, 1)
                self._image_cfg = number("Image guidance", 1.5, 1, 100)
                self._padding = number("Redraw only the mask, padding in pixels", None, 0, 4096, 1)
                self._padding.classes("sl-both")
            ui.label("Outpaint, pixels").classes("sl-quiet")
            with ui.element("div").classes("sl-pair"):
                self._sides = [number(label, None, 0, 4096, 8) for label in ("Left", "Top", "Right", "Bottom")]

    def _controls(self, serving: Services, names: list[str]) -> None:
        with section("ControlNet") as self._control_section:
            self._net = ui.select([NONE, *names], label="ControlNet", value=NONE).props("outlined dense")
            self._shown = PictureField(serving, "controls", "Picture")
            self._module = ui.select(list(PREPROCESSORS), label="Preprocessor", value="canny").props("outlined dense")
            self._mode = ui.select(list(CONTROL_MODES), label="Mode", value="balanced").props("outlined dense")
            with ui.element("div").classes("sl-three"):
                self._weight = number("Weight", 1.0, -2, 2)
                self._start = number("From", 0.0, 0, 1)
                self._end = number("To", 1.0, 0, 1)
            with ui.element("div").classes("sl-pair"):
                self._low = number("Low threshold", 100, 0, 255, 1)
                self._high = number("High threshold", 200, 1, 10000, 1)
            self._resize = ui.select(list(RESIZES), label="Resize", value="just_resize").props("outlined dense")
            self._type = ui.input("Type of picture (Union)").props("outlined dense")
            with ui.element("div").classes("sl-row") as self._more:
                self._names = ui.label("").classes("sl-text sl-quiet")
                ui.button(icon="close", on_click=lambda: self._set_others(())).props(
                    'flat round dense size=sm aria-label="Remove the further ControlNets"'
                )
            self._set_others(())

    def _set_others(self, others: tuple[Control, ...]) -> None:
        """Set the ControlNets after the first one, which come from the image whose settings the user has chosen."""
        self._others = others
        self._names.set_text(f"and {', '.join(other.name for other in others)}")
        self._more.set_visibility(bool(others))

    def values(self) -> dict[str, Any]:
        """Return the fields for a request. Raises RequestError when a value is not allowed."""
        values: dict[str, Any] = {
            "hires_scale": self._hires.value or 1.0,
            "hires_upscaler": self._upscaler.value,
            "hires_strength": self._again.value,
            "hires_steps": int(self._steps.value or 0),
            "tile": None if self._tile.value is None else int(self._tile.value),
            "lenient": self._lenient.value,
            "seamless": self._seamless.value,
            "variation_seed": int(self._variation.value or 0),
            "variation_strength": self._share.value or 0.0,
            "vae": "" if self._vae.value == OWN else self._vae.value,
            "text_encoder": "" if self._encoder.value == OWN else self._encoder.value,
            "prompt_syntax": self._syntax.value,
        }
        if self._refiner.value != NONE:
            values |= {"refiner": self._refiner.value, "refiner_start": self._refiner_start.value}
        if self._image.digest:
            outpaint = tuple(int(side.value or 0) for side in self._sides)
            values |= {"image": self._image.digest, "strength": self._strength.value, "mask": self._mask.digest}
            values["image_cfg"] = 1.5 if self._image_cfg.value is None else self._image_cfg.value
            values["outpaint"] = outpaint if any(outpaint) else ()
            if self._mask.digest or any(outpaint):
                values["mask_blur"] = int(self._blur.value or 0)
                values["mask_padding"] = None if self._padding.value is None else int(self._padding.value)
        if self._references.digests:
            values["references"] = self._references.digests
        if self._net.value != NONE:
            how = {name: field.value for name, field in self._control_fields().items()}
            how |= {"low": int(how["low"] or 0), "high": int(how["high"] or 0)}
            values["controls"] = (Control(self._net.value, self._shown.digest, **how), *self._others)
        return values

    def _control_fields(self) -> dict[str, Any]:
        """Return the elements by the names of the fields of :class:`safelight.request.adapters.Control`."""
        return {
            "weight": self._weight,
            "start": self._start,
            "end": self._end,
            "mode": self._mode,
            "preprocessor": self._module,
            "low": self._low,
            "high": self._high,
            "resize_mode": self._resize,
            "union_type": self._type,
        }

    def start_from(self, digest: str) -> None:
        """Choose a stored input image to start from."""
        self._image.set(digest)
        self._mask.clear()
        self._image_section.set_value(True)

    def fill(self, request: dict[str, Any]) -> None:
        """Set every field to its value in an image's request. Pictures and adapters that are gone are left out."""
        inputs = self._serving.catalog.inputs
        self._image.set(inputs.stored_digest(request.get("image", "")))
        self._mask.set(inputs.stored_digest(request.get("mask", "")))
        self._references.set(tuple(filter(None, map(inputs.stored_digest, request.get("references", ())))))
        self._strength.set_value(request.get("strength", 0.75))
        self._image_cfg.set_value(request.get("image_cfg", 1.5))
        self._blur.set_value(request.get("mask_blur", 4))
        self._padding.set_value(request.get("mask_padding"))
        for side, pixels in zip(self._sides, request.get("outpaint") or (None,) * 4, strict=True):
            side.set_value(pixels or None)
        self._hires.set_value(request.get("hires_scale", 1.0))
        self._upscaler.set_value(request.get("hires_upscaler", "latent"))
        self._again.set_value(request.get("hires_strength", 0.7))
        self._steps.set_value(request.get("hires_steps", 0))
        self._tile.set_value(request.get("tile"))
        self._lenient.set_value(request.get("lenient", False))
        self._seamless.set_value(request.get("seamless", ""))
        self._variation.set_value(request.get("variation_seed", 0))
        self._share.set_value(request.get("variation_strength", 0.0))
        self._vae.set_value(_among(self._vae, request.get("vae")))
        self._encoder.set_value(_among(self._encoder, request.get("text_encoder")))
        self._refiner.set_value(_among(self._refiner, request.get("refiner"), NONE))
        self._refiner_start.set_value(request.get("refiner_start", 0.8))
        self._syntax.set_value(request.get("prompt_syntax", "a1111"))
        first = next(iter(request.get("controls", ())), None)
        self._net.set_value(NONE if first is None else _among(self._net, first["name"], NONE))
        self._set_others(tuple(Control(**one) for one in (request.get("controls") or ())[1:]))
        if first is not None:
            self._shown.set(inputs.stored_digest(first["image"]))
            for name, field in self._control_fields().items():
                field.set_value(first[name])
        self._image_section.set_value(bool(self._image.digest or self._references.digests))
        self._control_section.set_value(first is not None)


def _among(field: ui.select, value: str | None, default: str = OWN) -> str:
    options: list[str] = field.options  # pyright: ignore[reportAssignmentType]
    return value if value in options else default
