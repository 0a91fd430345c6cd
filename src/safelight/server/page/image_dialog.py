"""The dialog of one image: the image, its facts, and what the user can do with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nicegui import ui

from safelight.assembly.services import Services
from safelight.errors import SafelightError
from safelight.queue.stored_image import StoredImage
from safelight.request.samplers import a1111_name
from safelight.request.values import UPSCALERS
from safelight.server import bridge
from safelight.server.page.form import Form


class ImageDialog:
    """Opens the dialog of an image.

    ``form``: the form that the dialog's buttons fill.
    ``remove``: removes the image with an identifier.
    """

    def __init__(self, control: Services, form: Form, remove: Callable[[str], None]) -> None:
        self._control = control
        self._form = form
        self._remove_image = remove
        self._place = ui.element("div")

    def open(self, image: StoredImage) -> None:
        """Open the dialog of an image."""
        request: dict[str, Any] = image.metadata["request"]
        # The dialog is outside the clicked element, because the gallery is redrawn when an image is finished.
        with self._place, ui.dialog(value=True) as dialog, ui.element("div").classes("sl-dialog q-card"):
            dialog.on("hide", dialog.delete)
            ui.element("img").props(f'src="/api/v1/images/{image.id}/file" alt=""').classes("sl-big")
            with ui.element("div").style("display: flex; flex-direction: column; gap: 14px; min-width: 0"):
                ui.label(request["prompt"]).style("font-size: 16px")
                _facts(image)
                verdict = ui.label("").classes("sl-quiet")
                ui.button("Same as in a fresh process?", on_click=lambda: self._check(image, verdict)).props(
                    "outline no-caps"
                ).classes("sl-soft")
                ui.button("Use these settings", on_click=lambda: self._use(request, dialog)).props(
                    "outline no-caps"
                ).classes("sl-soft")
                ui.button("Start from this image", on_click=lambda: self._start_from(image, dialog)).props(
                    "outline no-caps"
                ).classes("sl-soft")
                with ui.element("div").classes("sl-row"):
                    ui.link("Download", f"/api/v1/images/{image.id}/file").props(
                        f'download="{image.model}-{image.seed}.png"'
                    ).style("color: var(--lamp)")
                    ui.element("span").classes("sl-grow")
                    ui.button("Remove", on_click=lambda: self._remove(image, dialog)).props(
                        "flat no-caps dense"
                    ).classes("sl-soft")

    async def _check(self, image: StoredImage, verdict: ui.label) -> None:
        verdict.classes(remove="sl-good sl-bad")
        verdict.set_text("A fresh process is making the image again …")
        try:
            found = await bridge.run(self._control.fresh_processes.compare, image)
        except SafelightError as error:
            verdict.set_text(str(error))
            verdict.classes("sl-bad")
            return
        verdict.set_text("Yes: pixel for pixel the same." if found.same else "No: the pixels differ.")
        verdict.classes("sl-good" if found.same else "sl-bad")

    def _use(self, request: dict[str, Any], dialog: ui.dialog) -> None:
        self._form.fill(request)
        dialog.close()

    async def _start_from(self, image: StoredImage, dialog: ui.dialog) -> None:
        data = await bridge.run(self._control.gallery.path(image).read_bytes)
        self._form.further.start_from(await bridge.run(self._control.catalog.inputs.store, "image", data))
        dialog.close()

    def _remove(self, image: StoredImage, dialog: ui.dialog) -> None:
        self._remove_image(image.id)
        dialog.close()


def _facts(image: StoredImage) -> None:
    request, settings = image.metadata["request"], image.metadata["run"]
    marks: list[str] = image.metadata.get("marks", [])
    facts = {
        **({"Suspicious": "; ".join(marks) + ". The image can still be right."} if marks else {}),
        "Model": image.model,
        "Digest": image.model_digest[:12],
        "Seed": image.seed,
        "Size": f"{image.width} × {image.height}",
        "Steps": request["steps"],
        "Guidance": request["cfg"],
        "CLIP skip": request["clip_skip"],
        "Sampler": f"{a1111_name(request['sampler'])}, {request['schedule']}",
        "Negative prompt": request["negative"] or "none",
        **_further(request),
        "Made on": f"{settings['device']}, {settings['dtype']}",
        "Pixels": image.pixels_sha256[:16],
    }
    with ui.element("div").classes("sl-facts"):
        for name, value in facts.items():
            ui.html(f"<b>{name}</b>", sanitize=False)
            ui.label(str(value))


def _further(request: dict[str, Any]) -> dict[str, Any]:
    """Return the facts that most images do not have."""
    numbers = {
        "Distilled guidance": request.get("guidance"),
        "Shift": request.get("shift"),
        "First block cache": request.get("first_block_cache") or None,
    }
    found: dict[str, Any] = {label: f"{value:g}" for label, value in numbers.items() if value is not None}
    if request.get("loras"):
        found["Adapters"] = ", ".join(f"{lora['name']} {lora['strength']:g}" for lora in request["loras"])
    if request.get("embeddings"):
        found["Textual inversions"] = ", ".join(embedding["name"] for embedding in request["embeddings"])
    if request.get("controls"):
        found["ControlNet"] = ", ".join(f"{one['name']} {one['weight']:g}" for one in request["controls"])
    if request.get("references"):
        found["Reference images"] = len(request["references"])
    if request.get("image"):
        found["From an image"] = f"denoising strength {request['strength']:g}" + (
            ", masked" if request.get("mask") else ""
        )
    if request.get("hires_scale", 1) > 1:
        found["Hires fix"] = f"× {request['hires_scale']:g}, {UPSCALERS[request['hires_upscaler']]}"
    if request.get("variation_strength"):
        found["Variation"] = f"{request['variation_strength']:g} of seed {request['variation_seed']}"
    if request.get("refiner"):
        found["Refiner"] = f"{request['refiner']} from {request['refiner_start']:g}"
    for name, label in (("vae", "VAE"), ("text_encoder", "Text encoder"), ("seamless", "Seamless")):
        if request.get(name):
            found[label] = request[name]
    return found
