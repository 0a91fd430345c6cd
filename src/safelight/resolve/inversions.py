"""Textual inversions in prompts: which vectors stand for which word in which text encoder. Imports no torch.

Gal et al. 2022 (arXiv 2208.01618). Supported files: those of AUTOMATIC1111 (``string_to_param``, ``emb_params``), of
diffusers (the tensor's name is the word), and of SDXL (``clip_l``, ``clip_g``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from safelight.catalog.adapters import Adapters
from safelight.catalog.model import Adapter, Model
from safelight.errors import RequestError
from safelight.families.features import Feature
from safelight.request.adapters import Embedding
from safelight.request.prompts import words
from safelight.request.prompts.editing import prompt_per_step_of
from safelight.request.prompts.tokens import TOKENS_PER_CHUNK, token_ids_of_prompt, tokens_of
from safelight.request.schema import Request
from safelight.weights.adapter_file import INVERSION


@dataclass(frozen=True, slots=True)
class Inversion:
    """A textual inversion in a job.

    ``tokens``: the tokens that the vectors replace, in this job only.
    ``tensor_names``: name of the adapter's tensor, of shape (n, width), by text encoder.
    """

    adapter: Adapter
    embedding: Embedding
    tokens: tuple[int, ...]
    tensor_names: Mapping[str, str]


def resolve_inversions(request: Request, model: Model, adapters: Adapters, by_path: bool) -> tuple[Inversion, ...]:
    """Return the textual inversions that a request lists. If it has no list, return those that its prompts name.

    ``by_path``: the request may name an inversion by its path.
    Raises RequestError for an inversion that does not fit the model.
    Raises ModelNotFoundError for a word that is written as ``<word>`` or ``embedding:word`` and is not the name of an
    inversion.
    """
    if Feature.TEXTUAL_INVERSION not in model.family.features:
        return ()
    texts = request.prompt, request.negative
    asked = request.embeddings
    if asked is None:
        # As in A1111, a plain word names an inversion only if the inversion fits the model. For a word written as
        # <word> or embedding:word, an inversion that does not fit is an error.
        known = _fitting(adapters, model)
        asked = tuple(Embedding(name, word) for word, name in sorted(words.find_embeddings(texts, known).items()))
    found = [(embedding, _find_inversion_file(embedding, adapters, by_path)) for embedding in asked]
    tensor_names = [tensor_names_by_encoder(embedding, adapter, model) for embedding, adapter in found]
    counts = {e.word: _count(e, a, v) for (e, a), v in zip(found, tensor_names, strict=True)}
    if not counts:
        return ()
    tokens = words.assign_tokens(counts, _prompt_token_ids(request, counts))
    return tuple(
        Inversion(a, Embedding(a.name, e.word, a.digest), tokens[e.word], v)
        for (e, a), v in zip(found, tensor_names, strict=True)
    )


def _prompt_token_ids(request: Request, counted: Mapping[str, int]) -> set[int]:
    """Return the tokens of the prompts, without those of the inversions' words."""
    if request.prompt_syntax != "a1111":
        return {*tokens_of(request.prompt), *tokens_of(request.negative)}
    return {
        token
        for field, text in (("prompt", request.prompt), ("negative", request.negative))
        for variant in dict.fromkeys(prompt_per_step_of(request, text, field))
        for token in token_ids_of_prompt(field, variant, counted)
    }


def _find_inversion_file(embedding: Embedding, adapters: Adapters, by_path: bool) -> Adapter:
    if embedding.digest:
        found = adapters.find_by_digest(embedding.name, embedding.digest, by_path)
    else:
        found = adapters.ensure_unchanged(adapters.find(embedding.name) if by_path else adapters.get(embedding.name))
    if found.kind != INVERSION:
        raise RequestError("embeddings", embedding.name, f"is a {found.kind}, not a textual inversion")
    return found


def _fitting(adapters: Adapters, model: Model) -> tuple[str, ...]:
    """Return the names of all inversions that fit the model's text encoders. Cached until an adapter is added or
    removed."""
    known = adapters.inversions()
    widths = _widths(model)
    if widths not in known.fitting:
        known.fitting[widths] = tuple(n for n, shapes in known.shapes.items() if not _find_mismatch(shapes, model))
    return known.fitting[widths]


def _widths(model: Model) -> tuple[tuple[str, int], ...]:
    """Return the width of the token embeddings of each text encoder."""
    encoders = (model.manifest.component(role) for role in model.family.text_encoders)
    return tuple((one.role, one.config.hidden_size) for one in encoders)


def _match_tensors_to_encoders(tensors: Collection[str], model: Model) -> dict[str, str]:
    """Return for each text encoder (by role) the name of the tensor that has its vectors."""
    if len(tensors) == 1:
        return dict.fromkeys(model.family.text_encoders[:1], next(iter(tensors)))
    names = model.family.embedding_names
    return {names.get(name, ""): name for name in tensors}


def _find_mismatch(tensors: Mapping[str, tuple[int, ...]], model: Model) -> str:
    """Return why vectors of these shapes do not fit these text encoders; "" if they do.

    They fit if each text encoder has vectors of its own width.
    """
    matches, widths = _match_tensors_to_encoders(tensors, model), dict(_widths(model))
    if matches.keys() != widths.keys():
        return f"has the tensors {', '.join(tensors)}, but the model has {', '.join(widths)}"
    for role, name in matches.items():
        shape = tensors[name]
        if len(shape) not in (1, 2) or shape[-1] != widths[role]:
            return f"its vectors are {list(shape)}; the {role} of the model is {widths[role]} wide"
    return ""


def tensor_names_by_encoder(embedding: Embedding, adapter: Adapter, model: Model) -> dict[str, str]:
    """Return the tensor of each text encoder. Raises RequestError for an inversion that does not fit."""
    tensors = {tensor.name: tensor.shape for tensor in adapter.component.tensors}
    problem = _find_mismatch(tensors, model)
    if problem:
        raise RequestError("embeddings", embedding.name, f"{problem} ({model.name})")
    return _match_tensors_to_encoders(tensors, model)


def _count(embedding: Embedding, adapter: Adapter, tensor_names: Mapping[str, str]) -> int:
    shapes = {tensor.name: tensor.shape for tensor in adapter.component.tensors}
    counts = {shapes[name][0] if len(shapes[name]) == 2 else 1 for name in tensor_names.values()}
    if len(counts) != 1 or not 1 <= max(counts) <= TOKENS_PER_CHUNK:
        found = " and ".join(map(str, sorted(counts)))
        problem = f"has {found} vectors; it needs 1 to {TOKENS_PER_CHUNK}, as many in each encoder"
        raise RequestError("embeddings", embedding.name, problem)
    return counts.pop()
