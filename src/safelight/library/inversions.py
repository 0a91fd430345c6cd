"""Textual inversions that prompts name: which vectors stand for which word, in which text encoder. No torch.

Gal et al. 2022 (arXiv 2208.01618). Files: AUTOMATIC1111's (``string_to_param``, ``emb_params``), diffusers' (the
tensor's name is the word), and SDXL's (``clip_l``, ``clip_g``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from safelight.errors import RequestError
from safelight.formats.adapter import INVERSION
from safelight.formats.keys.clip import CLIPConfig
from safelight.library.adapters import Adapters
from safelight.library.model import Adapter, Model
from safelight.prompts import words
from safelight.prompts.editing import of_request
from safelight.prompts.tokens import ROOM, tokens_of, used
from safelight.request.parts import Embedding
from safelight.request.schema import Request

_ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}


@dataclass(frozen=True, slots=True)
class Inversion:
    """``tokens``: whose places the vectors take, in this job only. ``vectors``: by text encoder the name of the
    adapter's tensor, (n, width)."""

    adapter: Adapter
    embedding: Embedding
    tokens: tuple[int, ...]
    vectors: Mapping[str, str]


def chosen(request: Request, model: Model, adapters: Adapters, by_path: bool) -> tuple[Inversion, ...]:
    """Those of the request, or those that its prompts name. Raises RequestError for one that does not fit the model,
    ModelNotFoundError for a word that is marked as one and is none."""
    texts = request.prompt, request.negative
    asked = request.embeddings
    if asked is None:
        # As A1111 does it, a plain word means one that fits the model; one that is marked has to.
        known = _fitting(adapters, model)
        asked = tuple(Embedding(name, word) for word, name in sorted(words.named(texts, known).items()))
    found = [(embedding, _found(embedding, adapters, by_path)) for embedding in asked]
    vectors = [_vectors(embedding, adapter, model) for embedding, adapter in found]
    counts = {e.word: _count(e, a, v) for (e, a), v in zip(found, vectors, strict=True)}
    if not counts:
        return ()
    places = words.places(counts, _used(request, counts))
    return tuple(
        Inversion(a, Embedding(a.name, e.word, a.digest), places[e.word], v)
        for (e, a), v in zip(found, vectors, strict=True)
    )


def _used(request: Request, counted: Mapping[str, int]) -> set[int]:
    """The tokens of the prompts beside those of the words."""
    if request.prompt_syntax != "a1111":
        return {*tokens_of(request.prompt), *tokens_of(request.negative)}
    return {
        token
        for field, text in (("prompt", request.prompt), ("negative", request.negative))
        for one in dict.fromkeys(of_request(request, text, field))
        for token in used(field, one, counted)
    }


def _found(embedding: Embedding, adapters: Adapters, by_path: bool) -> Adapter:
    if embedding.digest:
        found = adapters.find(embedding.name, embedding.digest, by_path)
    else:
        found = adapters.checked(adapters.resolve(embedding.name) if by_path else adapters.get(embedding.name))
    if found.kind != INVERSION:
        raise RequestError("embeddings", embedding.name, f"is a {found.kind}, not a textual inversion")
    return found


def _fitting(adapters: Adapters, model: Model) -> tuple[str, ...]:
    """The names of all that fit the model's text encoders; kept as long as no adapter is added or removed."""
    known = adapters.inversions()
    encoders = tuple((c.role, c.config) for c in model.manifest.components if isinstance(c.config, CLIPConfig))
    if encoders not in known.fitting:
        known.fitting[encoders] = tuple(n for n, shapes in known.shapes.items() if not _odd(shapes, dict(encoders)))
    return known.fitting[encoders]


def _slots(tensors: Collection[str]) -> dict[str, str]:
    """Text encoder to tensor."""
    return {_ENCODERS.get(name, "text_encoder" if len(tensors) == 1 else ""): name for name in tensors}


def _odd(tensors: Mapping[str, tuple[int, ...]], encoders: Mapping[str, CLIPConfig]) -> str:
    """Why vectors of these shapes do not fit these text encoders, "" when they do: each has some, of its width."""
    slots = _slots(tensors)
    if slots.keys() != encoders.keys():
        return f"has {', '.join(tensors)}; the model has {', '.join(encoders)}"
    for role, name in slots.items():
        shape = tensors[name]
        if len(shape) not in (1, 2) or shape[-1] != encoders[role].width:
            return f"its vectors are {list(shape)}; the {role} of the model is {encoders[role].width} wide"
    return ""


def _vectors(embedding: Embedding, adapter: Adapter, model: Model) -> dict[str, str]:
    """Text encoder to tensor. Raises RequestError for one that does not fit."""
    encoders = {c.role: c.config for c in model.manifest.components if isinstance(c.config, CLIPConfig)}
    tensors = {tensor.name: tensor.shape for tensor in adapter.tensors.tensors}
    problem = _odd(tensors, encoders)
    if problem:
        raise RequestError("embeddings", embedding.name, f"{problem} ({model.name})")
    return _slots(tensors)


def _count(embedding: Embedding, adapter: Adapter, vectors: Mapping[str, str]) -> int:
    shapes = {tensor.name: tensor.shape for tensor in adapter.tensors.tensors}
    counts = {shapes[name][0] if len(shapes[name]) == 2 else 1 for name in vectors.values()}
    if len(counts) != 1 or not 1 <= max(counts) <= ROOM:
        problem = f"has {' and '.join(map(str, sorted(counts)))} vectors; one to {ROOM}, as many in each encoder"
        raise RequestError("embeddings", embedding.name, problem)
    return counts.pop()
