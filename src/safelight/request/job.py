"""A job: a complete request, in which every name is resolved to content.

The same document is the row in the queue, the message to the worker, and the metadata in the PNG. No torch, no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from safelight.errors import RequestError
from safelight.request.schema import VERSION, Request
from safelight.request.stored import read_request


@dataclass(frozen=True, slots=True)
class ModelReference:
    """The model of a job.

    ``digest``: of its content.
    ``components``: the digests of the model's own components, by role, before replacements (:class:`Job`'s ``parts``)
    and adapters.
    """

    name: str
    digest: str
    base: str
    prediction_type: str
    zero_terminal_snr: bool
    components: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ComponentReference:
    """A component that takes the place of the model's own.

    ``digest``: of the component.
    ``source``: where it is: in a ``model``, or in an ``adapter``'s file of its own.
    ``source_digest``: of that model or adapter.
    """

    role: str
    digest: str
    source: Literal["model", "adapter"]
    source_digest: str


@dataclass(frozen=True, slots=True)
class Job:
    """A complete request: what was asked for, by content.

    ``request``: all names are those of the library, with digests; sizes and seed are filled in.
    ``parts``: components in place of the model's own.
    ``refiner``: the model that computes the last steps; None without one.
    ``words``: words of the prompts that name textual inversions. Each word gets rare, unused CLIP token ids; the
    inversion's vectors overwrite the embeddings of these ids.
    """

    request: Request
    model: ModelReference
    parts: tuple[ComponentReference, ...] = ()
    words: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    refiner: ModelReference | None = None

    def image(self, index: int) -> Job:
        """Return the job of one image, counted from 0. Raises IndexError."""
        return replace(self, request=self.request.for_image(index))

    def to_json(self) -> dict[str, Any]:
        """Return the job as JSON values."""
        return {
            "version": VERSION,
            "request": asdict(self.request),
            "model": asdict(self.model),
            "refiner": None if self.refiner is None else asdict(self.refiner),
            "parts": [asdict(part) for part in self.parts],
            "words": {word: list(tokens) for word, tokens in self.words.items()},
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Job:
        """Read a job that :meth:`to_json` wrote, by this version or by an earlier one that already stored jobs.

        Version 1 stored requests.

        Raises RequestError, which names the field, if this version cannot read it.
        """
        request = read_request(stored["request"], stored["version"])
        try:
            model = ModelReference(**stored["model"])
            parts = tuple(ComponentReference(**part) for part in stored["parts"])
            words = {word: tuple(tokens) for word, tokens in stored["words"].items()}
            refiner = ModelReference(**stored["refiner"]) if stored.get("refiner") else None
        except (KeyError, TypeError, AttributeError) as error:
            problem = f"its field {error} is missing" if isinstance(error, KeyError) else f"cannot be read ({error})"
            raise RequestError("job", f"version {stored['version']}", problem) from error
        return cls(request, model, parts, words, refiner)


def is_resolved(stored: Mapping[str, Any]) -> bool:
    """Whether a stored document is a job. Version 1 stored requests only."""
    return "model" in stored
