"""A stored image, and what may change of it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NO_BOARD = "none"
"""In filters and changes: images that are on no board."""


@dataclass(frozen=True, slots=True)
class StoredImage:
    """A stored image.

    ``job``: the job that made it; "" for an imported image.
    ``place``: its number in its job, from 0.
    ``file``: the path of its file, below the folder of images; that of an imported image is absolute.
    ``width``, ``height``: in pixels.
    ``seed``: None if an imported image does not say it.
    ``model``, ``model_digest``: ``model_digest`` is "" for an image of another program.
    ``pixels_sha256``: "" for an image of another program, and if the file has other pixels than were made (JPEG).
    ``created``: in seconds since 1970.
    ``program``: the program that made it.
    ``board``: the identifier of its board, "" if it is on none.
    ``trashed``: when it was moved to the trash, in seconds since 1970; None if it is not there.
    ``same``: whether a fresh process made the same pixels; None if nobody has asked.
    ``person``: whose it is; "" if the server knew no people.
    ``bytes``: the size of its file; 0 for an imported image.
    """

    id: str
    job: str
    place: int
    file: str
    width: int
    height: int
    seed: int | None
    model: str
    model_digest: str
    pixels_sha256: str
    created: float
    metadata: dict[str, Any]
    prompt: str = ""
    negative: str = ""
    loras: tuple[str, ...] = ()
    program: str = "Safelight"
    imported: bool = False
    starred: bool = False
    board: str = ""
    tags: tuple[str, ...] = ()
    trashed: float | None = None
    same: bool | None = None
    person: str = ""
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Board:
    """A board.

    ``person``: its owner. ``shared``: whether others see it and its images.
    ``images``: how many images it has, without those in the trash. ``cover``: its newest image, or "".
    """

    id: str
    name: str
    created: float
    person: str = ""
    shared: bool = False
    images: int = 0
    cover: str = ""


@dataclass(frozen=True, slots=True)
class ImageFilter:
    """Which images a list has. A value of None or "" does not restrict it.

    ``search``: words in prompts, names of models and LoRAs, tags and names of imported files.
    ``board``: the identifier of a board, or :data:`NO_BOARD`.
    ``after``, ``before``: in seconds since 1970; ``before`` is not part of the range.
    ``trashed``: only images in the trash, in place of all others.
    ``person``: only images of this person.
    """

    search: str = ""
    model: str = ""
    lora: str = ""
    tag: str = ""
    board: str = ""
    program: str = ""
    starred: bool | None = None
    seed: int | None = None
    after: float | None = None
    before: float | None = None
    trashed: bool = False
    person: str | None = None


@dataclass(frozen=True, slots=True)
class ImageChange:
    """A change of several images. None and () leave a value as it is.

    ``board``: the identifier of a board, or :data:`NO_BOARD`.
    ``trashed``: move to the trash, or restore.
    """

    starred: bool | None = None
    board: str | None = None
    add_tags: tuple[str, ...] = ()
    remove_tags: tuple[str, ...] = ()
    trashed: bool | None = None


@dataclass(frozen=True, slots=True)
class ImagePage:
    """A part of a list. ``next``: the cursor of the part after it; "" if this is the last one."""

    images: list[StoredImage]
    next: str


@dataclass(frozen=True, slots=True)
class Facets:
    """How many images each model, LoRA, tag and program has, without those in the trash; the most frequent first."""

    models: Mapping[str, int] = field(default_factory=dict[str, int])
    loras: Mapping[str, int] = field(default_factory=dict[str, int])
    tags: Mapping[str, int] = field(default_factory=dict[str, int])
    programs: Mapping[str, int] = field(default_factory=dict[str, int])
