"""The route that reads how a picture was made, whichever program made it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from safelight.assembly.services import Services
from safelight.catalog.file_hashes import FileHashes
from safelight.catalog.inputs import FORMATS
from safelight.pictures.generation_data import GenerationData, Program
from safelight.pictures.opening import opened as opened_file
from safelight.pictures.read_generation_data import read
from safelight.queue.image_files import READ
from safelight.resolve.foreign import carry_over
from safelight.server.access import Who
from safelight.server.apis.base64_pictures import opened
from safelight.server.apis.native_fields import ImageId
from safelight.server.apis.native_images import require_file
from safelight.server.problems import documented, found


class PictureToRead(BaseModel):
    """A PNG, JPEG, WebP or AVIF file in base64, with or without ``data:image/…;base64,``."""

    model_config = ConfigDict(extra="forbid")

    image: str


class UsedLoraModel(BaseModel):
    """A LoRA. ``digest``: as the program writes it."""

    name: str
    strength: float
    digest: str


class GenerationDataModel(BaseModel):
    """How a picture was made. A value that the file does not have is null, or empty.

    ``cfg``: the scale of classifier-free guidance. ``guidance``: that of a distilled model.
    ``sampler``, ``schedule``, ``model``, ``model_hash``, ``vae``: as the program names them.
    ``strength``: how much of an input image was drawn again.
    ``others``: what else the file says.
    """

    program: Program
    prompt: str
    negative: str
    seed: int | None
    steps: int | None
    cfg: float | None
    guidance: float | None
    shift: float | None
    sampler: str
    schedule: str
    width: int | None
    height: int | None
    model: str
    model_hash: str
    vae: str
    clip_skip: int | None
    strength: float | None
    loras: list[UsedLoraModel]
    others: dict[str, str]
    use: SettingsToUse


class SettingsToUse(BaseModel):
    """The picture's settings as a request of ``POST /api/v1/generate``.

    ``request``: its fields; without a model if the library does not have the picture's.
    ``not_carried_over``: a sentence for each thing that these fields do not have.
    """

    request: dict[str, Any]
    not_carried_over: list[str]


class PictureRoutes:
    """The routes for pictures of any program."""

    def __init__(self, control: Services) -> None:
        self._control = control

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.post("/pictures/read", tags=["images"], responses=documented())(self.read)
        api.get("/images/{image_id}/generation-data", tags=["images"], responses=documented(404))(self.of_image)

    def read(self, asked: PictureToRead) -> GenerationDataModel | None:
        """Read how a picture was made, by Safelight or by another program.

        It reads A1111, Forge, ComfyUI, InvokeAI, NovelAI, Fooocus, SwarmUI and Draw Things.
        The answer is null if the file says nothing about it.
        """
        with opened("image", asked.image, (*FORMATS, "AVIF")) as image:
            made = read(image)
        return None if made is None else self._model(made)

    def of_image(self, image_id: ImageId, who: Who) -> GenerationDataModel | None:
        """Read how an image of the gallery was made, and the request that makes one like it.

        The answer is null if its file says nothing about it.
        """
        image = found(self._control.database.images.seen_by(who).get(image_id), "image", image_id)
        path = self._control.gallery.path(image)
        require_file(path, image_id)
        with opened_file(path, READ) as picture:
            made = read(picture)
        return None if made is None else self._model(made)

    def _model(self, made: GenerationData) -> GenerationDataModel:
        carried = carry_over(made, self._control.catalog, FileHashes(self._control.settings.root))
        fields = carried.fields | ({"model": carried.model} if carried.model else {})
        fields["loras"] = [{"name": one.name, "strength": one.strength} for one in carried.fields.get("loras", ())]
        use = SettingsToUse(request=fields, not_carried_over=list(carried.left_out))
        return GenerationDataModel(**asdict(made), use=use)
