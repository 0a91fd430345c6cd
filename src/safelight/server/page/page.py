"""The page: a form on the left, images on the right. Each browser tab has a :class:`Tab` of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from nicegui import ui

from safelight.assembly.services import Services
from safelight.errors import InputError, SafelightError
from safelight.queue.database import StoredImage
from safelight.queue.image_files import preview_url
from safelight.queue.job import QueuedJob
from safelight.request.results import Preview
from safelight.request.samplers import a1111_name
from safelight.request.schema import UPSCALERS, Request
from safelight.server import bridge, intake
from safelight.server.page import memory
from safelight.server.page.form import Form

STYLE = Path(__file__).with_name("style.css")

EVERY_SECONDS = 0.4
"""Seconds between two checks for changes."""

WAITING = 12
"""The number of waiting jobs on the page."""

SHOWN = 60
"""The number of images in the gallery, and of those that the button More adds."""


def mount(app: FastAPI, control: Services) -> None:
    """Add the page to the application, at ``/``."""

    @ui.page("/", title="Safelight")
    async def page() -> None:
        tab = Tab(control)
        tab.build()
        ui.context.client.on_delete(tab.remove_all)
        await ui.context.client.connected(CONNECTED_SECONDS)
        await tab.restore()

    ui.run_with(app, title="Safelight", favicon=_FAVICON, dark=None, show_welcome_message=False, tailwind=False)


_FAVICON = (
    "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'><circle cx='16' cy='16' r='11' fill='#b5371f'/></svg>"
)


CONNECTED_SECONDS = 30.0
"""Seconds for which the server waits for the browser."""

KEPT = "safelight"
"""The key in the browser's local storage for form and sheet, which survive a reload and a restart of the server."""

MOST_KEPT = 200
"""The number of jobs on the sheet that the browser stores."""

UNDO_SECONDS = 10.0
"""Seconds for which the user can undo a removal."""


class Tab:
    """The content of one browser tab: the form, the memory, the running job, the sheet and the gallery.

    The sheet shows the jobs of the tab's last request, one for each model.
    """

    def __init__(self, control: Services) -> None:
        self._control = control
        self._asked: list[str] = []
        self._seen = -1
        self._shown = SHOWN
        self._library = [*control.library.cards(), *control.catalog.adapters.cards()]
        self._stored = ""
        self._empty: dict[str, Any] = {}
        self._restored = False
        self._removing: dict[str, float] = {}

    def build(self) -> None:
        """Create the elements, and start the timer that checks for changes."""
        ui.add_css(STYLE.read_text())
        ui.colors(primary="#b5371f", negative="#8f2a17", dark="#1e1d1b", dark_page="#151413")
        self._dark = ui.dark_mode(value=None)
        self._top()
        with ui.element("div").classes("sl-main"):
            with ui.element("div").classes("sl-side"):
                self._form = Form(self._control, self._make)
                with ui.element("div").classes("sl-card sl-memory"):
                    ui.label("Memory").classes("sl-title")
                    self._memory = ui.element("div").classes("w-full")
            with ui.element("div").classes("sl-work"):
                self._now = ui.element("div")
                self._sheet = ui.element("div")
                with ui.element("div"):
                    ui.label("Gallery").classes("sl-title").style("margin-bottom: 10px")
                    self._gallery = ui.element("div").classes("sl-grid")
                    self._more = ui.button("More", on_click=self._show_more).props("flat no-caps").classes("sl-soft")
        self._dialogs = ui.element("div")
        with ui.element("div").classes("sl-undo") as self._undo:
            self._undo_says = ui.label("")
            ui.button("Undo", on_click=self._restore_removed).props("flat no-caps dense")
        self._undo.set_visibility(False)
        self._running = _Running(self._now, self._control)
        self._empty = self._form.kept()
        ui.timer(EVERY_SECONDS, self._look)

    async def restore(self) -> None:
        """Restore the form and the sheet that this browser has stored."""
        text = await ui.run_javascript(f"localStorage.getItem({json.dumps(KEPT)})", timeout=CONNECTED_SECONDS)
        try:
            stored: dict[str, Any] = json.loads(text) if text else {}
            # The user may have changed the form before the browser answered: do not overwrite that.
            if not self._asked and self._form.kept() == self._empty:
                self._form.restore(stored.get("form", {}))
                self._asked = [str(job) for job in stored.get("asked", [])][:MOST_KEPT]
        except (ValueError, KeyError, TypeError, AttributeError, InputError):
            # Another version or another program wrote it: the form stays as it is.
            ui.notify("The form that this browser has stored cannot be read.", type="warning")
        self._seen = -1
        self._restored = True

    def _store(self) -> None:
        """Store the form and the sheet in the browser, if they have changed."""
        text = json.dumps({"form": self._form.kept(), "asked": self._asked})
        if self._restored and text != self._stored:
            self._stored = text
            ui.run_javascript(f"localStorage.setItem({json.dumps(KEPT)}, {json.dumps(text)})")

    def _top(self) -> None:
        with ui.element("header").classes("sl-top"):
            ui.element("span").classes("sl-lamp")
            ui.label("Safelight").classes("sl-name")
            self._status = ui.label("").classes("sl-quiet sl-wide")
            ui.element("span").classes("sl-grow")
            ui.button(icon="contrast", on_click=self._toggle_dark).props(
                'flat round dense aria-label="Light or dark"'
            ).classes("sl-soft")

    async def _toggle_dark(self) -> None:
        dark = await ui.run_javascript("document.body.classList.contains('body--dark')")
        self._dark.set_value(not dark)

    async def _make(self, requests: list[Request]) -> None:
        try:
            jobs = await bridge.run(_queue, self._control, requests)
        except SafelightError as error:
            ui.notify(str(error), type="negative", multi_line=True, timeout=8000)
            return
        self._asked = [job.id for job in jobs]
        self._seen = -1
        await self._look()

    async def _look(self) -> None:
        control = self._control
        self._store()
        await self._remove_for_good()
        self._running.show(control.dispatcher.state)
        memory.show(self._memory, control.dispatcher.memory, self._library)
        run_settings = control.supervisor.run_settings(0.0)
        where = f"{run_settings['device']}, {run_settings['dtype']}" if run_settings is not None else "starting …"
        self._status.set_text(where)
        changes = control.events.changes
        if changes == self._seen:
            return
        self._seen = changes
        seen = await bridge.run(_seen, control, self._asked, self._shown + len(self._removing))
        self._running.queue(seen.queue)
        self._draw_sheet(seen.sheet)
        self._draw_gallery([image for image in seen.gallery if image.id not in self._removing])

    def _draw_sheet(self, sheet: list[tuple[QueuedJob, dict[int, StoredImage]]]) -> None:
        self._sheet.clear()
        if not sheet:
            return
        with self._sheet:
            ui.label(sheet[0][0].request.prompt or "(no prompt)").classes("sl-title").style("margin-bottom: 10px")
            with ui.element("div").classes("sl-sheet"):
                for job, images in sheet:
                    for place in range(job.request.count):
                        self._cell(job, images.get(place))

    def _cell(self, job: QueuedJob, image: StoredImage | None) -> None:
        with ui.element("figure").style("margin: 0; min-width: 0"):
            if image is not None:
                self._shot(image)
            else:
                words = {"queued": "waiting", "running": "running", "failed": job.reason, "cancelled": "cancelled"}
                with ui.element("div").classes("sl-wait"):
                    ui.label(words.get(job.state, "")).classes("sl-bad" if job.state == "failed" else "")
            ui.label(job.request.model).classes("sl-under")

    def _draw_gallery(self, images: list[StoredImage]) -> None:
        self._more.set_visibility(len(images) > self._shown)
        self._gallery.clear()
        with self._gallery:
            for image in images[: self._shown]:
                self._shot(image)
            if not images:
                ui.label("No images yet. Write a prompt, and press Make.").classes("sl-empty").style(
                    "grid-column: 1/-1"
                )

    def _show_more(self) -> None:
        self._shown += SHOWN
        self._seen = -1

    def _shot(self, image: StoredImage) -> None:
        shot = ui.element("button").classes("sl-shot").props(f'aria-label="Image by {image.model}, seed {image.seed}"')
        shot.on("click", lambda: self._open(image))
        with shot:
            if image.metadata.get("marks"):
                ui.label("suspicious").classes("sl-mark").tooltip("; ".join(image.metadata["marks"]))
            ui.element("img").props(f'src="/api/v1/images/{image.id}/thumbnail" loading="lazy" alt=""')

    def _open(self, image: StoredImage) -> None:
        request: dict[str, Any] = image.metadata["request"]
        # The dialog is outside the clicked element, because the gallery is redrawn when an image is finished.
        with self._dialogs, ui.dialog(value=True) as dialog, ui.element("div").classes("sl-dialog q-card"):
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
            found = await bridge.run(self._control.fresh.compared, image)
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
        data = await bridge.run(self._control.gallery.path(image.file).read_bytes)
        self._form.further.start_from(await bridge.run(self._control.catalog.inputs.keep, "image", data))
        dialog.close()

    def _remove(self, image: StoredImage, dialog: ui.dialog) -> None:
        """Hide the image now, and remove it after ``UNDO_SECONDS`` unless the user undoes that."""
        self._removing[image.id] = time.monotonic() + UNDO_SECONDS
        self._say_removing()
        dialog.close()

    def _restore_removed(self) -> None:
        self._removing.clear()
        self._say_removing()

    def _say_removing(self) -> None:
        count = len(self._removing)
        self._undo_says.set_text(f"{count} image{'s' if count > 1 else ''} removed")
        self._undo.set_visibility(bool(count))
        self._seen = -1

    async def remove_all(self) -> None:
        """Remove all hidden images now, because the tab is closed and the user cannot undo it any more."""
        await self._forget(list(self._removing))

    async def _remove_for_good(self) -> None:
        over = [image for image, until in self._removing.items() if time.monotonic() > until]
        await self._forget(over)
        if over:
            self._say_removing()

    async def _forget(self, images: list[str]) -> None:
        for image in images:
            del self._removing[image]
            await bridge.run(self._control.dispatcher.forget, image)


@dataclass(frozen=True, slots=True)
class _Seen:
    """The part of the database that a tab shows.

    ``queue``: the next jobs, each with its reason.
    ``sheet``: the tab's own jobs, each with its images by place.
    ``gallery``: the newest images.
    """

    queue: list[tuple[QueuedJob, str]]
    sheet: list[tuple[QueuedJob, dict[int, StoredImage]]]
    gallery: list[StoredImage]


def _seen(control: Services, asked: list[str], shown: int) -> _Seen:
    database = control.database
    jobs = database.jobs_of(asked)
    sheet = [
        (jobs[job], {image.place: image for image in database.images(1000, job=job)}) for job in asked if job in jobs
    ]
    return _Seen(control.dispatcher.queue(WAITING), sheet, database.images(shown + 1))


def _queue(control: Services, requests: list[Request]) -> list[QueuedJob]:
    return intake.accept(control, *requests, client="page")


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
    found: dict[str, Any] = {}
    if request.get("loras"):
        found["Adapters"] = ", ".join(f"{lora['name']} {lora['strength']:g}" for lora in request["loras"])
    if request.get("embeddings"):
        found["Textual inversions"] = ", ".join(embedding["name"] for embedding in request["embeddings"])
    if request.get("controls"):
        found["ControlNet"] = ", ".join(f"{one['name']} {one['weight']:g}" for one in request["controls"])
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


class _Running:
    """The running job and the waiting jobs."""

    def __init__(self, into: ui.element, control: Services) -> None:
        self._control = control
        self._into = into
        with into, ui.element("div").classes("sl-card"):
            with ui.element("div").classes("sl-now"):
                self._picture = ui.element("img").classes("sl-preview").props('alt="The unfinished image"')
                with ui.element("div").style("flex: 1; min-width: 0; display: flex; flex-direction: column; gap: 8px"):
                    self._what = ui.label("").style("font-size: 16px")
                    self._how = ui.label("").classes("sl-quiet")
                    with ui.element("div").classes("sl-progress"):
                        self._bar = ui.element("i").style("width: 0")
                self._cancel = ui.button("Cancel", on_click=self._stop).props("outline no-caps").classes("sl-soft")
            self._waiting = ui.element("div").style("display: flex; flex-direction: column; gap: 6px; width: 100%")
        into.set_visibility(False)
        self._job = ""
        self._preview: Preview | None = None

    async def _stop(self) -> None:
        await bridge.run(self._control.dispatcher.cancel, self._job)

    def show(self, state: Any) -> None:
        """Show the running job; ``state`` is None when no job runs."""
        self._into.set_visibility(state is not None)
        if state is None:
            return
        job, progress = state.job, state.progress
        if job.id != self._job:
            self._job, self._preview = job.id, None
            self._picture.props(remove="src")
        self._what.set_text(job.request.prompt or "(no prompt)")
        stage, share = "waiting for the worker", 0.0
        if progress is not None:
            words = {
                "switch": "switching models",
                "encode": "encoding the prompt",
                "denoise": "step",
                "decode": "decoding",
            }
            stage = words[progress.stage]
            if progress.stage == "denoise":
                stage += f" {progress.step} of {progress.steps}"
            done = progress.step if progress.stage == "denoise" else progress.steps * (progress.stage == "decode")
            whole = max(1, progress.steps)
            share = (progress.image + min(1.0, done / whole)) / job.request.count
            if progress.preview is not None and progress.preview is not self._preview:
                self._preview = progress.preview
                self._picture.props(f'src="{preview_url(progress.preview)}"')
        self._how.set_text(f"{job.request.model}: {stage} ({job.reason})")
        self._bar.style(f"width: {share:.0%}")

    def queue(self, waiting: list[tuple[QueuedJob, str]]) -> None:
        """Show the waiting jobs in their order, with the reasons."""
        self._waiting.clear()
        with self._waiting:
            for job, reason in waiting:
                with ui.element("div").classes("sl-row"):
                    ui.label(f"{job.request.model}: {job.request.prompt}").classes("sl-text")
                    ui.label(reason).classes("sl-quiet sl-wide")
                    ui.button(icon="close", on_click=_canceller(self._control, job.id)).props(
                        'flat round dense size=sm aria-label="Cancel"'
                    ).classes("sl-soft")


def _canceller(control: Services, job_id: str) -> Callable[[], Awaitable[None]]:
    async def cancel() -> None:
        await bridge.run(control.dispatcher.cancel, job_id)

    return cancel
