"""Routes for the preview pictures of models and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Header
from starlette.responses import Response

from safelight.assembly.services import Services
from safelight.catalog import previews
from safelight.catalog.cards import Card
from safelight.queue.events import Event
from safelight.queue.person import Person
from safelight.server.access import Who
from safelight.server.apis.native_fields import PreviewChoice
from safelight.server.problems import documented, found

WEBP: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/webp": {}}, "description": "the picture"},
    304: {"description": "the client has it"},
}

Known = Annotated[str, Header()]
"""``If-None-Match``: the tag of the picture that the client has."""


class PreviewRoutes:
    """The routes for preview pictures."""

    def __init__(self, control: Services) -> None:
        self._control, self._root = control, control.library.root

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        webp, done = {**WEBP, **documented(404)}, documented(404)
        api.get("/models/{name}/preview", tags=["models"], response_class=Response, responses=webp)(self.of_model)
        api.put("/models/{name}/preview", tags=["models"], status_code=204, responses=done)(self.set_of_model)
        api.get("/adapters/{name}/preview", tags=["models"], response_class=Response, responses=webp)(self.of_adapter)
        api.put("/adapters/{name}/preview", tags=["models"], status_code=204, responses=done)(self.set_of_adapter)

    def of_model(self, name: str, if_none_match: Known = "") -> Response:
        """Return the preview picture of a model: the chosen one, or the one beside its file."""
        return self._send(self._control.catalog.model_card(name), if_none_match)

    def of_adapter(self, name: str, if_none_match: Known = "") -> Response:
        """Return the preview picture of an adapter: the chosen one, or the one beside its file."""
        return self._send(self._control.catalog.adapter_card(name), if_none_match)

    def set_of_model(self, name: str, choice: PreviewChoice, who: Who) -> Response:
        """Set the preview picture of a model."""
        return self._set(self._control.catalog.model_card(name), choice, who)

    def set_of_adapter(self, name: str, choice: PreviewChoice, who: Who) -> Response:
        """Set the preview picture of an adapter."""
        return self._set(self._control.catalog.adapter_card(name), choice, who)

    def _send(self, card: Card, known: str) -> Response:
        path = found(previews.find(card, self._root), "preview of", card.name)
        # Another picture may be chosen at any time, so the client asks each time.
        headers = {"Cache-Control": "no-cache", "ETag": previews.tag(path)}
        if known == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(previews.webp(path), media_type="image/webp", headers=headers)

    def _set(self, card: Card, choice: PreviewChoice, who: Person) -> Response:
        picture = None
        if choice.image:
            image = found(self._control.database.images.seen_by(who).get(choice.image), "image", choice.image)
            picture = self._control.gallery.path(image)
        previews.choose(card, self._root, picture)
        self._control.events.tell(Event("models", ""))
        return Response(status_code=204)


def preview_path(kind: str, card: Card, root: Path) -> str:
    """Return the path of a preview on this server; "" if there is none. ``kind``: models or adapters."""
    path = f"/api/v1/{kind}/{quote(card.name, safe='')}/preview"
    return path if previews.find(card, root) is not None else ""
