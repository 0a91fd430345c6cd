"""Removing images: a tab hides them at once, and the server removes them when the user can no longer undo that."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from nicegui import ui

from safelight.assembly.services import Services
from safelight.queue.stored_image import ImageChange
from safelight.server import bridge

UNDO_SECONDS = 10.0
"""Seconds for which the user can undo a removal."""


class Removals:
    """The images that the user of a tab has removed and can still restore, and the bar with the button Undo.

    ``on_change``: called when images are hidden or shown again.
    """

    def __init__(self, control: Services, on_change: Callable[[], None]) -> None:
        self._control = control
        self._on_change = on_change
        self._until: dict[str, float] = {}
        with ui.element("div").classes("sl-undo") as self._bar:
            self._count = ui.label("")
            ui.button("Undo", on_click=self._undo).props("flat no-caps dense")
        self._bar.set_visibility(False)

    @property
    def hidden(self) -> Collection[str]:
        """The identifiers of the images that the tab must not show."""
        return self._until.keys()

    def remove(self, image_id: str) -> None:
        """Hide the image now, and remove it after ``UNDO_SECONDS`` unless the user undoes that."""
        self._until[image_id] = time.monotonic() + UNDO_SECONDS
        self._show_count()

    async def finish_due(self) -> None:
        """Remove the images that the user has not restored in time."""
        due = [image_id for image_id, until in self._until.items() if time.monotonic() > until]
        await self._finish(due)
        if due:
            self._show_count()

    async def finish_all(self) -> None:
        """Remove all hidden images now, because the tab is closed and the user cannot undo it any more."""
        await self._finish(list(self._until))

    async def _finish(self, image_ids: list[str]) -> None:
        for image_id in image_ids:
            del self._until[image_id]
            await bridge.run(self._control.images.change, [image_id], ImageChange(trashed=True))

    def _undo(self) -> None:
        self._until.clear()
        self._show_count()

    def _show_count(self) -> None:
        count = len(self._until)
        self._count.set_text(f"{count} image{'s' if count > 1 else ''} removed")
        self._bar.set_visibility(bool(count))
        self._on_change()
