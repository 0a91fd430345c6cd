"""The requests and answers of Safelight's own API, as pydantic models, and the parameters that its routes share."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_origin

from fastapi import Path as InPath
from fastapi import Query
from pydantic import BaseModel, ConfigDict, create_model
from pydantic import Field as FieldOf

from safelight.queue.job import State
from safelight.request.adapters import Control, Embedding, Lora
from safelight.request.bounds import MOST_SEED
from safelight.request.field import Field, fields_of
from safelight.request.schema import Request

JobId = Annotated[str, InPath(pattern="^[0-9a-f]{32}$", description="a job's identifier")]
ImageId = Annotated[str, InPath(pattern="^[0-9a-f]{32}$", description="an image's identifier")]
Limit = Annotated[int, Query(ge=1, le=1000)]
"""The most entries of a list."""


def _model_of(kind: type, name: str, text: str) -> type[BaseModel]:
    """Create a pydantic model with the fields of the dataclass ``kind``; ``text``: its docstring."""
    fields: dict[str, Any] = {field.name: (_type_of(field), _info(field)) for field in fields_of(kind).values()}
    return create_model(name, __config__=ConfigDict(extra="forbid"), __doc__=text, **fields)


def _type_of(field: Field) -> Any:
    own = field.type
    if get_origin(own) is tuple:
        of = get_args(own)[0]
        own = list[PARTS.get(of, of)]
    return own | None if field.optional else own


def _info(field: Field) -> Any:
    declared, number = field.declared, field.type in (int, float)
    bounds: dict[str, Any] = (
        {"ge": declared.minimum, "le": declared.maximum, "gt": declared.exclusive_minimum} if number else {}
    )
    if get_origin(field.type) is tuple:
        bounds = {"max_length": declared.maximum and int(declared.maximum)}
    default: Any = list(field.default) if isinstance(field.default, tuple) else field.default
    start: dict[str, Any] = {} if field.required else {"default": default}
    return FieldOf(**start, **bounds, description=field.help)


PARTS: dict[Any, type[BaseModel]] = {}
PARTS.update(
    (kind, _model_of(kind, f"{kind.__name__}Model", text))
    for kind, text in (
        (Lora, "An adapter of the model's weights."),
        (Control, "A ControlNet and its picture."),
        (Embedding, "A textual inversion."),
    )
)

_REQUEST = _model_of(Request, "RequestModel", "The fields of a request.")


class Generation(_REQUEST):
    """A request for images."""

    model: str = FieldOf(default="", description="The name of a model; the server's default model if it is empty.")
    seed: int | None = FieldOf(default=None, ge=0, le=MOST_SEED, description=fields_of(Request)["seed"].declared.help)
    priority: int = FieldOf(default=0, ge=-100, le=100, description="Higher goes first, within the bound of the queue.")
    spread: bool = FieldOf(
        default=False, description="Divide the images among the server's slots: each part is a job of its own."
    )

    def request_fields(self) -> dict[str, Any]:
        """Return the fields of the request, without ``priority`` and ``spread``."""
        return self.model_dump(exclude={"priority", "spread"})


class AdapterModel(BaseModel):
    """An adapter of the library.

    ``base``: the base of the checkpoints that it is for; empty if unknown.
    ``digest``: empty for a file that was imported and has not been read yet.
    ``bytes``: the size of its tensors.
    ``trigger_words``: the words of a prompt that call a LoRA.
    ``preview``: the path of its preview picture on this server; empty if it has none.
    """

    name: str
    kind: str
    base: str
    dtype: str
    digest: str
    bytes: int
    trigger_words: list[str]
    preview: str


class JobModel(BaseModel):
    """A job. Times are seconds since 1970.

    ``person``: whose request it is; empty if the server does not know people.
    ``slot``: the device with its worker that ran it last; empty if none did.
    """

    id: str
    number: int
    state: State
    model: str
    model_digest: str
    request: dict[str, Any]
    client: str
    person: str
    slot: str
    priority: int
    created: float
    started: float | None
    ended: float | None
    attempts: int
    images: int
    overtaken: int
    reason: str
    failure: str = FieldOf(description="kind of a failed job: input, failed, device, storage or worker")


class Queued(JobModel):
    """A job that was queued. ``jobs``: the identifiers of all jobs of the request, this one first."""

    jobs: list[str]


class Priority(BaseModel):
    """The priority of a job. Higher goes first."""

    model_config = ConfigDict(extra="forbid")

    priority: int = FieldOf(ge=-100, le=100)


class Order(BaseModel):
    """Jobs that wait, the first one first. ``ids``: at most 100."""

    model_config = ConfigDict(extra="forbid")

    ids: Annotated[list[Annotated[str, FieldOf(pattern="^[0-9a-f]{32}$")]], FieldOf(max_length=100)]


class Place(BaseModel):
    """A waiting job, its place in the queue (0 starts next), and the reason for it."""

    job: JobModel
    place: int
    reason: str


class RunningModel(BaseModel):
    """A running job, the slot that runs it, and its progress; null until it has begun."""

    slot: str
    job: JobModel
    progress: dict[str, Any] | None


class Queue(BaseModel):
    """The running jobs, and the waiting jobs in the order in which they start if no other job arrives.

    ``others_running``, ``others_waiting``: the number of jobs of other people that are not listed.
    """

    running: list[RunningModel]
    waiting: list[Place]
    others_running: int
    others_waiting: int


class ModelModel(BaseModel):
    """A model of the library.

    ``digest``: empty for a file that was imported and has not been read yet.
    ``bytes``: the size of its weights.
    ``defaults``: what a request gets for fields that it does not name, in place of the family's defaults.
    ``preview``: the path of its preview picture on this server; empty if it has none.
    ``components``: the digest of each component, by role. Components from other files count, too.
    ``is_default``: requests that name no model use it.
    ``switch_seconds``: predicted until all its weights are in memory, if none is there; null if nothing is known.
    """

    name: str
    kind: str
    base: str
    variant: str
    prediction_type: str
    dtype: str
    digest: str
    origin: str
    rule: str
    format: str
    resolution: int
    bytes: int
    pinned: bool
    defaults: dict[str, Any] = {}
    preview: str = ""
    components: dict[str, str] = {}
    is_default: bool = False
    switch_seconds: float | None = None


class DefaultsModel(BaseModel):
    """All defaults of a model. A field that is left out has no default, so that of the model's family counts."""

    model_config = ConfigDict(extra="forbid")

    width: int | None = None
    height: int | None = None
    steps: int | None = None
    cfg: float | None = None
    guidance: float | None = None
    shift: float | None = None
    sampler: str | None = None
    schedule: str | None = None
    clip_skip: int | None = None
    vae: str | None = None


class PreviewChoice(BaseModel):
    """A preview picture. ``image``: an image of the gallery; empty for the picture beside the file."""

    model_config = ConfigDict(extra="forbid")

    image: Annotated[str, FieldOf(pattern="^([0-9a-f]{32})?$")]


class Adding(BaseModel):
    """A checkpoint on the server's disk, in one of the folders that ``model_folders`` allows."""

    model_config = ConfigDict(extra="forbid")

    path: str
    name: str | None = None
    prediction_type: Literal["epsilon", "v_prediction"] | None = None


class Downloading(BaseModel):
    """A source to download from.

    ``source``: a repository on Hugging Face (``OWNER/NAME``, ``OWNER/NAME/FILE``), a page of Hugging Face or of
    Civitai, ``civitai:MODEL@VERSION``, the https address of a file, or a name of the catalogue.
    ``file``, ``file_variant``, ``revision``: of a repository.
    ``name``: in the library; by default the file's.
    ``variant``: of a model that does not say it.
    """

    model_config = ConfigDict(extra="forbid")

    source: Annotated[str, FieldOf(min_length=1, max_length=2000)]
    file: str = ""
    file_variant: str = ""
    revision: str = ""
    name: str = ""
    variant: str = ""


class ChoiceModel(BaseModel):
    """What was taken from a repository."""

    file: str
    file_variant: str
    revision: str


class DownloadModel(BaseModel):
    """A download.

    ``title``, ``notes``: what the source says: licence, trigger words.
    ``done``, ``total``: bytes; ``total`` is null while it is unknown.
    ``rate``: bytes per second.
    ``added``: the names in the library.
    ``problem``: why it failed, or why a file was not added.
    ``created``: seconds since 1970.
    """

    id: str
    source: str
    choice: ChoiceModel
    name: str
    variant: str
    created: float
    state: Literal["queued", "running", "adding", "done", "failed", "cancelled"]
    title: str
    notes: list[str]
    done: int
    total: int | None
    rate: float
    seconds_left: float | None
    added: list[str]
    problem: str


class Verified(BaseModel):
    """``ok``: whether all bytes match the model's manifest; if not, ``problem`` names those that differ."""

    ok: bool
    problem: str = ""


class CancelledModel(BaseModel):
    """``cancelled``: whether this call ended the job; false if the job had ended before."""

    cancelled: bool


class Checked(BaseModel):
    """``pixels_sha256``: the hash of the pixels that the fresh process made."""

    same: bool
    pixels_sha256: str


class ResidentModel(BaseModel):
    """The digests of the models that are completely in memory, the most recently used first."""

    resident: list[str]


class SlotModel(BaseModel):
    """A device with its worker.

    ``worker``: ``ready`` or ``starting``.
    ``draining``: it takes no more jobs.
    ``problem``: why it cannot continue; empty if it can.
    ``machine``: of the cluster, where Ray has placed it; empty on the server's own.
    ``busy``: a job runs. ``job``: its identifier; empty if it is another person's. ``person``: whose it is.
    ``resident``: the names of the models in its memory, the most recently used first.
    ``switches``: jobs so far that needed another model. ``restarts``: of its worker.
    ``run``: the run settings of its worker; null until it is ready.
    """

    name: str
    worker: Literal["ready", "starting"]
    draining: bool
    problem: str
    machine: str
    busy: bool
    job: str
    person: str
    resident: list[str]
    switches: int
    restarts: int
    run: dict[str, Any] | None


class Health(BaseModel):
    """The state of the server.

    ``status``: ``waiting`` if the queue cannot continue; ``problem`` gives the reason.
    ``worker``: ``ready`` if any worker is, else ``starting``.
    ``paused``: no more jobs start.
    The other fields are only for clients that may use the server.
    """

    status: Literal["ok", "waiting"]
    worker: Literal["ready", "starting"]
    problem: str = ""
    version: str | None = None
    spare: bool | None = None
    restarts: int | None = None
    run: dict[str, Any] | None = None
    paused: bool | None = None
