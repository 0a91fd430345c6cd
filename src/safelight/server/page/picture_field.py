"""Fields for pictures: they upload and store a picture, show it small, and identify it by its digest."""

from __future__ import annotations

import base64
import io
from functools import partial

from nicegui import events, ui

from safelight.assembly.services import Services
from safelight.errors import InputError
from safelight.server import bridge

SHOWN = 120
"""The longer side of the small picture, in pixels."""


class PictureField:
    """A field for a picture. ``digest``: the digest of the chosen picture, "" for none."""

    def __init__(self, control: Services, field: str, label: str) -> None:
        self._control, self._field = control, field
        self.digest = ""
        with ui.element("div").classes("sl-row"):
            self._shown = ui.element("img").classes("sl-picture").props(f'alt="{label}"')
            self._upload = ui.upload(on_upload=self._on_upload, auto_upload=True, label=label, max_files=1)
            self._upload.props('accept="image/*" flat bordered dense').classes("sl-upload")
            self._clear = ui.button(icon="close", on_click=self.clear).props(
                f'flat round dense size=sm aria-label="Remove the {label.lower()}"'
            )
        self._draw()

    async def _on_upload(self, upload: events.UploadEventArguments) -> None:
        data = await upload.file.read()
        try:
            await self.take(data)
        except InputError as error:
            ui.notify(str(error), type="negative", multi_line=True, timeout=8000)
        self._upload.reset()

    async def take(self, data: bytes) -> None:
        """Store a picture's file and choose it. Raises RequestError when it is not a picture."""
        self.set(await bridge.run(self._control.catalog.inputs.store, self._field, data))

    def set(self, digest: str) -> None:
        """Choose a stored picture; "" for none."""
        self.digest = digest
        self._draw()

    def clear(self) -> None:
        """Choose no picture."""
        self.set("")

    def _draw(self) -> None:
        self._shown.set_visibility(bool(self.digest))
        self._clear.set_visibility(bool(self.digest))
        self._upload.set_visibility(not self.digest)
        if self.digest:
            self._shown.props(f'src="{_small(self._control, self.digest)}"')


class PictureList:
    """A field for several pictures. ``digests``: those of the chosen pictures, in their order."""

    def __init__(self, control: Services, field: str, label: str, most: int) -> None:
        self._control, self._field, self._label, self._most = control, field, label, most
        self.digests: tuple[str, ...] = ()
        self._shown = ui.element("div").classes("sl-row")
        self._upload = ui.upload(on_upload=self._on_upload, auto_upload=True, label=label)
        self._upload.props('accept="image/*" flat bordered dense').classes("sl-upload")

    async def _on_upload(self, upload: events.UploadEventArguments) -> None:
        data = await upload.file.read()
        try:
            digest = await bridge.run(self._control.catalog.inputs.store, self._field, data)
            self.set((*self.digests, digest))
        except InputError as error:
            ui.notify(str(error), type="negative", multi_line=True, timeout=8000)
        self._upload.reset()

    def set(self, digests: tuple[str, ...]) -> None:
        """Choose stored pictures."""
        self.digests = digests
        self._shown.clear()
        with self._shown:
            for number, digest in enumerate(digests, 1):
                source = _small(self._control, digest)
                ui.element("img").classes("sl-picture").props(f'alt="{self._label} {number}" src="{source}"')
                ui.button(icon="close", on_click=partial(self._remove, number)).props(
                    f'flat round dense size=sm aria-label="Remove {self._label.lower()} {number}"'
                )
        self._upload.set_visibility(len(digests) < self._most)

    def _remove(self, number: int) -> None:
        self.set((*self.digests[: number - 1], *self.digests[number:]))


def _small(control: Services, digest: str) -> str:
    """Return a stored picture, made small, as a data URL."""
    picture = control.catalog.inputs.open(digest)
    picture.thumbnail((SHOWN, SHOWN))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
