"""A field for a picture: uploaded, shown small, and known by its digest from then on."""

from __future__ import annotations

import base64
import io

from nicegui import events, ui

from safelight.assemble.serving import Services
from safelight.errors import InputError
from safelight.server import bridge

SHOWN = 120
"""Pixels of the longer side of what is shown."""


class PictureField:
    """``digest``: of the picture that was chosen, "" for none."""

    def __init__(self, control: Services, field: str, label: str) -> None:
        self._control, self._field = control, field
        self.digest = ""
        with ui.element("div").classes("sl-row"):
            self._shown = ui.element("img").classes("sl-picture").props(f'alt="{label}"')
            self._upload = ui.upload(on_upload=self._uploaded, auto_upload=True, label=label, max_files=1)
            self._upload.props('accept="image/*" flat bordered dense').classes("sl-upload")
            self._clear = ui.button(icon="close", on_click=self.clear).props(
                f'flat round dense size=sm aria-label="No {label.lower()}"'
            )
        self._draw()

    async def _uploaded(self, told: events.UploadEventArguments) -> None:
        data = await told.file.read()
        try:
            await self.take(data)
        except InputError as error:
            ui.notify(str(error), type="negative", multi_line=True, timeout=8000)
        self._upload.reset()

    async def take(self, data: bytes) -> None:
        """Keep a picture's file. Raises RequestError for what is none."""
        self.set(await bridge.run(self._control.shelves.inputs.keep, self._field, data))

    def set(self, digest: str) -> None:
        """Choose a picture that is kept already."""
        self.digest = digest
        self._draw()

    def clear(self) -> None:
        """Choose none."""
        self.set("")

    def _draw(self) -> None:
        self._shown.set_visibility(bool(self.digest))
        self._clear.set_visibility(bool(self.digest))
        self._upload.set_visibility(not self.digest)
        if self.digest:
            picture = self._control.shelves.inputs.open(self.digest)
            picture.thumbnail((SHOWN, SHOWN))
            held = io.BytesIO()
            picture.save(held, "PNG")
            self._shown.props(f'src="data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"')
