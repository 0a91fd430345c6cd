"""The page: a form on the left, images on the right. Each browser tab has a :class:`Tab` of its own."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from nicegui import ui

from safelight.assembly.services import Services
from safelight.errors import InputError, SafelightError
from safelight.queue.image_files import preview_url
from safelight.queue.job import QueuedJob
from safelight.queue.stored_image import StoredImage
from safelight.request.results import Preview
from safelight.request.schema import Request
from safelight.server import bridge, intake
from safelight.server.page import memory
from safelight.server.page.form import Form
from safelight.server.page.image_dialog import ImageDialog
from safelight.server.page.removals import Removals

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
        ui.context.client.on_delete(tab.close)
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
        self._removals = Removals(self._control, self._redraw_soon)
        self._dialog = ImageDialog(self._control, self._form, self._removals.remove)
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
        self._redraw_soon()
        self._restored = True

    async def close(self) -> None:
        """Finish what the tab has begun, because the browser has closed it."""
        await self._removals.finish_all()

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
        self._redraw_soon()
        await self._look()

    async def _look(self) -> None:
        control = self._control
        self._store()
        await self._removals.finish_due()
        self._running.show(control.dispatcher.running)
        memory.show(self._memory, control.dispatcher.memory, self._library)
        run_settings = control.supervisor.run_settings(0.0)
        where = f"{run_settings['device']}, {run_settings['dtype']}" if run_settings is not None else "starting …"
        self._status.set_text(where)
        changes = control.events.changes
        if changes == self._seen:
            return
        self._seen = changes
        seen = await bridge.run(_seen, control, self._asked, self._shown + len(self._removals.hidden))
        self._running.queue(seen.queue)
        self._draw_sheet(seen.sheet)
        self._draw_gallery([image for image in seen.gallery if image.id not in self._removals.hidden])

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
        self._redraw_soon()

    def _redraw_soon(self) -> None:
        """Draw everything again at the next look, even if the server has not changed."""
        self._seen = -1

    def _shot(self, image: StoredImage) -> None:
        shot = ui.element("button").classes("sl-shot").props(f'aria-label="Image by {image.model}, seed {image.seed}"')
        shot.on("click", lambda: self._dialog.open(image))
        with shot:
            if image.metadata.get("marks"):
                ui.label("suspicious").classes("sl-mark").tooltip("; ".join(image.metadata["marks"]))
            ui.element("img").props(f'src="/api/v1/images/{image.id}/thumbnail" loading="lazy" alt=""')


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
    sheet = [(jobs[job], {image.place: image for image in database.images.of_job(job)}) for job in asked if job in jobs]
    return _Seen(control.dispatcher.queue(WAITING), sheet, database.images.page(limit=shown + 1).images)


def _queue(control: Services, requests: list[Request]) -> list[QueuedJob]:
    return intake.accept(control, *requests, client="page")


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
