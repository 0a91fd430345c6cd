"""Routes for the models and adapters of the library."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

from safelight.assembly.services import Services
from safelight.catalog.cards import Card
from safelight.catalog.defaults import set_defaults
from safelight.errors import IntegrityError, ModelNotFoundError
from safelight.queue.events import Event
from safelight.queue.timings import known
from safelight.server import bridge, intake
from safelight.server.apis.native_fields import AdapterModel, Adding, DefaultsModel, ModelModel, Verified
from safelight.server.apis.native_previews import preview_path
from safelight.server.problems import RefusedError, documented


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
        api.delete("/models/{name}", tags=["models"], status_code=204, responses=documented(404))(self.remove_model)
        api.delete("/adapters/{name}", tags=["models"], status_code=204, responses=documented(404))(self.remove_adapter)
        api.put("/models/{name}/defaults", tags=["models"], responses=documented(404))(self.set_defaults)
        api.post("/models/{name}/verify", tags=["models"], responses=documented(404, 409))(self.verify)

    def adapters(self) -> list[AdapterModel]:
        """List the adapters: LoRAs and their relatives, VAEs, ControlNets and textual inversions.

        LoRAs and their relatives are for ``loras``, and for ``<lora:name:strength>`` in a prompt.
        """
        return [
            AdapterModel(**card.summary, preview=preview_path("adapters", card, self._library.root))
            for card in self._control.catalog.adapters.cards()
        ]

    def models(self) -> list[ModelModel]:
        """List the models of the library."""
        default, cards = self._default(), self._library.cards()
        seconds = self._control.timings.switch_seconds(known(card) for card in cards)
        return [self._describe(card, default, switch) for card, switch in zip(cards, seconds, strict=True)]

    async def add(self, adding: Adding) -> ModelModel:
        """Add a checkpoint to the library: identify it, hash it and name it. Its file stays where it is."""
        path = _within(Path(adding.path), self._control.settings.model_folders)
        model = await bridge.long(self._library.add, path, adding.name, adding.prediction_type)
        self._control.events.tell(Event("models", ""))
        return await bridge.run(self.one_model, model.name)

    def one_model(self, name: str) -> ModelModel:
        """Return what is known about a model."""
        card = self._control.catalog.model_card(name)
        # The first one is this model; the others are what it may be predicted from.
        models = (card, *self._library.cards())
        [seconds, *_] = self._control.timings.switch_seconds(known(one) for one in models)
        return self._describe(card, self._default(), seconds)

    def remove_model(self, name: str) -> Response:
        """Forget a model. Its files stay where they are, and can be added again."""
        self._library.remove(self._control.catalog.model_card(name).name)
        self._control.events.tell(Event("models", ""))
        return Response(status_code=204)

    def remove_adapter(self, name: str) -> Response:
        """Forget an adapter. Its file stays where it is, and can be added again."""
        self._control.catalog.adapters.remove(self._control.catalog.adapter_card(name).name)
        self._control.events.tell(Event("models", ""))
        return Response(status_code=204)

    def set_defaults(self, name: str, defaults: DefaultsModel) -> ModelModel:
        """Replace what requests get that do not say otherwise. The page, the commands and all APIs use it."""
        card = self._control.catalog.model_card(name)
        set_defaults(self._library, card.name, defaults.model_dump(exclude_none=True))
        return self.one_model(card.name)

    async def verify(self, name: str) -> Verified:
        """Read all bytes of the model's files again, and compare them with the manifest."""
        try:
            await bridge.long(self._library.verify, name)
        except IntegrityError as error:
            return Verified(ok=False, problem=str(error))
        return Verified(ok=True)

    def _default(self) -> str:
        """Return the name of the default model; "" if ``default_model`` names none, or the library is empty."""
        try:
            return intake.default_card(self._control).name
        except ModelNotFoundError:
            return ""

    def _describe(self, card: Card, default: str, switch_seconds: float | None) -> ModelModel:
        """Describe a model. ``default``: the name of the default model."""
        shown = {key: value for key, value in card.summary.items() if key != "path"}
        return ModelModel(
            **shown,
            pinned=any(card.name in slot.supervisor.pinned for slot in self._control.dispatcher.slots),
            preview=preview_path("models", card, self._library.root),
            components=dict(card.components),
            is_default=card.name == default,
            switch_seconds=switch_seconds,
        )


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
