"""The requests and answers of the routes for images and boards, as pydantic models."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict
from pydantic import Field as FieldOf

from safelight.queue.descriptions import image_to_dict
from safelight.queue.stored_image import ImageFilter, StoredImage
from safelight.request.bounds import MOST_SEED

HEX = "^[0-9a-f]{32}$"
BOARD = "^([0-9a-f]{32}|none)$"

Name = Annotated[str, FieldOf(min_length=1, max_length=200, pattern=r"\S")]
MOST_IDS = 10_000
"""Images of one change. The database is locked while they are changed."""

Ids = Annotated[list[Annotated[str, FieldOf(pattern=HEX)]], FieldOf(max_length=MOST_IDS)]


class ImageModel(BaseModel):
    """A stored image.

    ``job``, ``place``: the job that made it, and its number there; ``job`` is empty for an imported image.
    ``created``, ``trashed``: seconds since 1970; ``trashed`` is null unless the image is in the trash.
    ``program``: the program that made it.
    ``board``: the identifier of its board, empty if it is on none.
    ``same``: whether a fresh process made the same pixels; null if nobody has asked.
    ``person``: whose it is; empty if the server knew no people.
    ``marks``: why it looks suspicious.
    ``file_name``, ``mime``: the name of its file without folders, and its media type.
    ``metadata``: null in lists without ``metadata=true``.
    """

    id: str
    job: str
    place: int
    width: int
    height: int
    seed: int | None
    model: str
    model_digest: str
    pixels_sha256: str
    created: float
    prompt: str
    negative: str
    loras: list[str]
    program: str
    imported: bool
    starred: bool
    board: str
    tags: list[str]
    trashed: float | None
    same: bool | None
    person: str
    marks: list[str]
    metadata: dict[str, Any] | None
    url: str
    file_name: str
    mime: str
    thumbnail: str


def image_model(image: StoredImage, *, metadata: bool = True) -> ImageModel:
    """Return an image as the API describes it."""
    values = image_to_dict(image)
    return ImageModel.model_validate(values if metadata else values | {"metadata": None})


class Filter(BaseModel):
    """Which images a list has. What is left out does not restrict it.

    ``search``: words, each the beginning of a word in a prompt, the name of a model or LoRA, a tag or the name of an
    imported file. Words in quotation marks must follow each other.
    ``board``: the identifier of a board, or ``none``.
    ``after``, ``before``: seconds since 1970.
    ``trashed``: the images in the trash, in place of the others.
    ``person``: only this person's images.
    """

    model_config = ConfigDict(extra="forbid")

    search: Annotated[str, FieldOf(max_length=1000)] = ""
    model: str = ""
    lora: str = ""
    tag: str = ""
    board: Annotated[str, FieldOf(pattern=f"{BOARD}|^$")] = ""
    program: str = ""
    starred: bool | None = None
    seed: Annotated[int | None, FieldOf(ge=0, le=MOST_SEED)] = None
    after: Annotated[float | None, FieldOf(ge=-1e15, le=1e15)] = None
    before: Annotated[float | None, FieldOf(ge=-1e15, le=1e15)] = None
    trashed: bool = False
    person: Annotated[str | None, FieldOf(max_length=64)] = None

    def filter(self) -> ImageFilter:
        """Return the filter of the database."""
        return ImageFilter(**{name: getattr(self, name) for name in Filter.model_fields})


class Listing(Filter):
    """A part of a list of images.

    ``limit``: the most images of the answer.
    ``cursor``: ``next`` of an earlier answer to the same question.
    ``metadata``: whether each image has its metadata.
    """

    limit: Annotated[int, FieldOf(ge=1, le=1000)] = 100
    cursor: Annotated[str, FieldOf(max_length=100)] = ""
    metadata: bool = False


class ImagePageModel(BaseModel):
    """Images, the newest first. ``next``: the cursor of the images after them, empty if there are none."""

    images: list[ImageModel]
    next: str


class Count(BaseModel):
    """A number of images."""

    count: int


class IdsModel(BaseModel):
    """Identifiers of images."""

    ids: list[str]


class Several(BaseModel):
    """Identifiers of images; unknown ones are left out."""

    model_config = ConfigDict(extra="forbid")

    ids: Ids


class Changing(Several):
    """A change of images. What is left out stays as it is.

    ``board``: the identifier of a board, or ``none``.
    ``trashed``: move to the trash, or restore. Images in the trash are deleted after ``trash_days``.
    """

    starred: bool | None = None
    board: Annotated[str | None, FieldOf(pattern=BOARD)] = None
    add_tags: Annotated[list[Name], FieldOf(max_length=100)] = []
    remove_tags: Annotated[list[Name], FieldOf(max_length=100)] = []
    trashed: bool | None = None


class BoardName(BaseModel):
    """The name of a board."""

    model_config = ConfigDict(extra="forbid")

    name: Name


class BoardChange(BaseModel):
    """What changes of a board. null leaves a value as it is.

    ``shared``: whether everybody sees the board and its images.
    """

    model_config = ConfigDict(extra="forbid")

    name: Name | None = None
    shared: bool | None = None
