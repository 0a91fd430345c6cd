"""Routes for the models and adapters of the library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter
from starlette.responses import Response

from safelight.assembly.services import Services
from safelight.catalog import previews
from safelight.catalog.cards import Card, find_card
from safelight.catalog.defaults import set_defaults
from safelight.errors import IntegrityError
from safelight.server import bridge
from safelight.server.apis.native_fields import AdapterModel, Adding, DefaultsModel, ModelModel, PreviewChoice, Verified
from safelight.server.problems import RefusedError, documented, found

WEBP: dict[int | str, dict[str, Any]] = {200: {"content": {"image/webp": {}}, "description": "the picture"}}


class ModelRoutes:
    """The routes for models and adapters."""

    def __init__(self, control: Services) -> None:
        self._control, self._library = control, control.library

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.get("/adapters", tags=["models"])(self.adapters)
        api.get("/models", tags=["models"])(self.models)
        api.post("/models", tags=["models"], status_code=201, responses=documented())(self.add)
        api.get("/models/{name}", tags=["models"], responses=documented(404))(self.one_model)
        webp = {**WEBP, **documented(404)}
        api.get("/models/{name}/preview", tags=["models"], response_class=Response, responses=webp)(self.model_preview)
        api.put("/models/{name}/preview", tags=["models"], responses=documented(404))(self.choose_model_preview)
        api.get("/adapters/{name}/preview", tags=["models"], response_class=Response, responses=webp)(
            self.adapter_preview
        )
        api.put("/adapters/{name}/preview", tags=["models"], responses=documented(404))(self.choose_adapter_preview)
        api.put("/models/{name}/defaults", tags=["models"], responses=documented(404))(self.set_defaults)
        api.post("/models/{name}/verify", tags=["models"], responses=documented(404, 409))(self.verify)

    def adapters(self) -> list[AdapterModel]:
        """List the adapters: LoRAs and their relatives, VAEs, ControlNets and textual inversions.

        LoRAs and their relatives are for ``loras``, and for ``<lora:name:strength>`` in a prompt.
        """
        return [
            AdapterModel(**card.summary, preview=self._preview("adapters", card))
            for card in self._control.catalog.adapters.cards()
        ]

    def models(self) -> list[ModelModel]:
        """List the models of the library."""
        return [self._describe_card(card) for card in self._library.cards()]

    async def add(self, adding: Adding) -> ModelModel:
        """Add a checkpoint to the library: identify it, hash it and name it. Its file stays where it is."""
        path = _within(Path(adding.path), self._control.settings.model_folders)
        model = await bridge.long(self._library.add, path, adding.name, adding.prediction_type)
        return self._describe(model.name, model.summary())

    def one_model(self, name: str) -> ModelModel:
        """Return what is known about a model."""
        return self._describe_card(self._model_card(name))

    def model_preview(self, name: str) -> Response:
        """Return the preview picture of a model: the chosen one, or the one beside its file."""
        return self._send_preview(self._model_card(name))

    def adapter_preview(self, name: str) -> Response:
        """Return the preview picture of an adapter: the chosen one, or the one beside its file."""
        return self._send_preview(self._adapter_card(name))

    def choose_model_preview(self, name: str, choice: PreviewChoice) -> ModelModel:
        """Set the preview picture of a model."""
        card = self._model_card(name)
        self._choose_preview(card, choice)
        return self._describe_card(card)

    def choose_adapter_preview(self, name: str, choice: PreviewChoice) -> AdapterModel:
        """Set the preview picture of an adapter."""
        card = self._adapter_card(name)
        self._choose_preview(card, choice)
        return AdapterModel(**card.summary, preview=self._preview("adapters", card))

    def set_defaults(self, name: str, defaults: DefaultsModel) -> ModelModel:
        """Replace what requests get that do not say otherwise. The page, the commands and all APIs use it."""
        card = self._model_card(name)
        set_defaults(self._library, card.name, defaults.model_dump(exclude_none=True))
        return self.one_model(card.name)

    async def verify(self, name: str) -> Verified:
        """Read all bytes of the model's files again, and compare them with the manifest."""
        try:
            await bridge.long(self._library.verify, name)
        except IntegrityError as error:
            return Verified(ok=False, problem=str(error))
        return Verified(ok=True)

    def _model_card(self, name: str) -> Card:
        return find_card(self._library.cards(), self._library.root, name)

    def _adapter_card(self, name: str) -> Card:
        return find_card(self._control.catalog.adapters.cards(), self._library.root, name, "adapter")

    def _choose_preview(self, card: Card, choice: PreviewChoice) -> None:
        picture = None
        if choice.image:
            image = found(self._control.database.images.get(choice.image), "image", choice.image)
            picture = self._control.gallery.path(image)
        previews.choose(card, self._library.root, picture)

    def _send_preview(self, card: Card) -> Response:
        path = found(previews.find(card, self._library.root), "preview of", card.name)
        # Another picture may be chosen at any time.
        return Response(previews.webp(path), media_type="image/webp", headers={"Cache-Control": "no-cache"})

    def _preview(self, kind: str, card: Card) -> str:
        path = f"/api/v1/{kind}/{quote(card.name, safe='')}/preview"
        return path if previews.find(card, self._library.root) is not None else ""

    def _describe_card(self, card: Card) -> ModelModel:
        described = self._describe(card.name, card.summary)
        return described.model_copy(update={"preview": self._preview("models", card)})

    def _describe(self, name: str, summary: Mapping[str, Any]) -> ModelModel:
        shown = {key: value for key, value in summary.items() if key != "path"}
        return ModelModel(**shown, pinned=name in self._control.supervisor.pinned)


def _within(path: Path, folders: tuple[Path, ...]) -> Path:
    """Return the resolved path. Raises RefusedError when it is in none of the folders."""
    try:
        real = path.expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise RefusedError(422, "invalid_request", f"path: {error}", "path") from error
    if not any(real.is_relative_to(folder.expanduser().resolve()) for folder in folders):
        allowed = ", ".join(map(str, folders)) or "none; set model_folders"
        message = f"{path} is in none of the folders from which models may be added: {allowed}"
        raise RefusedError(403, "forbidden", message, "path")
    return real
