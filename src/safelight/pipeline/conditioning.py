"""From prompts to the conditions of each step. A cache holds what text encoders returned, by a hash of all inputs."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from safelight.devices.transfer import checksum_of
from safelight.families.family import Family
from safelight.families.family_model import (
    PromptText,
    Reference,
    ReferencePrompts,
    Tensors,
    TextInput,
    TextInputs,
    family_model,
)
from safelight.families.features import Feature
from safelight.families.tokenizer_file import TokenizerContent
from safelight.pipeline.denoise import ConditionsByStep
from safelight.pipeline.guidance import Condition
from safelight.request.prompts.editing import prompt_per_step_of
from safelight.request.prompts.words import InversionTokens
from safelight.request.run_settings import RunSettings
from safelight.request.schema import Request
from safelight.request.steps import computed_steps
from safelight.weights.digest import hash_texts
from safelight.weights.manifest import ComponentManifest
from safelight.weights.overlay import OverlaidComponent

MAX_CACHE_BYTES = 24 << 20
"""Size limit of the cache in bytes of host memory, which the ledger reserves: about forty SDXL prompts."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompt and the negative prompt of each step. The steps of a second pass follow those of the first."""

    prompt: Sequence[str]
    negative: Sequence[str]

    @classmethod
    def of(cls, request: Request, family: Family) -> Prompts:
        """Return the texts of a request. Raises RequestError for an edit that cannot be parsed."""
        if request.prompt_syntax == "compel" or Feature.PROMPT_WEIGHTS not in family.features:
            return cls([request.prompt] * computed_steps(request), [request.negative] * computed_steps(request))
        return cls(
            prompt_per_step_of(request, request.prompt, "prompt"),
            prompt_per_step_of(request, request.negative, "negative"),
        )

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The distinct (prompt, negative prompt) pairs, in the order of their first use."""
        return list(dict.fromkeys(zip(self.prompt, self.negative, strict=True)))

    @property
    def index_by_step(self) -> list[int]:
        """The index into :attr:`pairs` for each step."""
        place = {pair: number for number, pair in enumerate(self.pairs)}
        return [place[pair] for pair in zip(self.prompt, self.negative, strict=True)]

    @property
    def texts(self) -> list[PromptText]:
        """The distinct texts, each with the field that it comes from."""
        both = [
            *(PromptText("prompt", text) for text in self.prompt),
            *(PromptText("negative", text) for text in self.negative),
        ]
        return list(dict.fromkeys(both))


@dataclass(frozen=True, slots=True)
class TextEncoderCall:
    """A call of a text encoder: everything that its output depends on, except the text.

    ``references``: the reference images, in the size in which it sees them. The key of a :class:`TextInput` has their
    digests.
    ``vision``: the vision encoder that sees the reference images for it; None for a text encoder that sees none.
    ``source``: the text encoder whose outputs it reads (``Component.reads``); None if it reads no other's.
    """

    family: Family
    variant: str
    role: str
    component: ComponentManifest
    run_settings: RunSettings
    request: Request
    inversion_tokens: InversionTokens
    references: Sequence[Reference] = ()
    vision: ComponentManifest | None = None
    source: ComponentManifest | None = None

    def key(self, text: TextInput) -> str:
        """Hash everything that the output depends on (rows STATE 13 and 14 of docs/corruption.md)."""
        run = self.run_settings
        how = [run.device, run.hardware, run.dtype, run.attention, run.attention_slice_size, run.threads]
        components = [one for one in (self.component, self.vision, self.source) if one is not None]
        overlays = [one.overlay_digest if isinstance(one, OverlaidComponent) else "" for one in components]
        what = [self.family.name, self.role, *(one.digest for one in components), *overlays]
        asked = [self.request.skipped_layers, self.request.prompt_syntax]
        return hash_texts(json.dumps([what, asked, how, dict(run.versions)]), text.key)

    def inputs(self, texts: Sequence[PromptText]) -> TextInputs:
        """Tokenize texts. Raises RequestError for what cannot be parsed."""
        if (prompts := self._reference_prompts) is not None:
            return prompts.text_inputs(self.variant, texts, self.references, self._tokenizer)
        model = family_model(self.family).with_tokenizer(self._tokenizer)
        return model.text_inputs(self.family, self.role, self.request, texts, self.inversion_tokens)

    def encode(
        self,
        inputs: Sequence[TextInput],
        device: torch.device,
        seen: Tensors,
        read: Sequence[Tensors],
        modules: Sequence[nn.Module],
        leases: object = None,
    ) -> list[Tensors]:
        """Run the bound encoder, the only one of ``modules``, on each input.

        ``seen``: what the vision encoder returned for the reference images; empty without one.
        ``read``: what the text encoder ``source`` returned for the text of each input; empty without one.
        """
        del leases
        if self.source is not None:
            return family_model(self.family).encode_texts_after(self.role, modules[0], inputs, read, device)
        if (prompts := self._reference_prompts) is not None:
            return prompts.encode_texts(modules[0], inputs, seen, device)
        model = family_model(self.family).with_tokenizer(self._tokenizer)
        return model.encode_texts(
            self.family, self.role, modules[0], self.request, inputs, self.inversion_tokens, device
        )

    def see(self, device: torch.device, modules: Sequence[nn.Module], leases: object = None) -> Tensors:
        """Run the bound vision encoder, the only one of ``modules``, on the reference images."""
        del leases
        prompts = self._reference_prompts
        assert prompts is not None
        return prompts.see(modules[0], self.references, device)

    @property
    def _tokenizer(self) -> TokenizerContent | None:
        return None if self.component.tokenizer is None else self.component.tokenizer.read()

    @property
    def _reference_prompts(self) -> ReferencePrompts | None:
        return None if self.vision is None else family_model(self.family).reference_prompts


class EmbeddingCache:
    """A cache of what text encoders returned, by a hash of all inputs. Evicts the least recently used entries.

    Each entry is compared with its checksums before it is used again.
    """

    def __init__(self, max_bytes: int = MAX_CACHE_BYTES) -> None:
        self._cached: OrderedDict[str, tuple[Tensors, list[str]]] = OrderedDict()
        self._max_bytes = max_bytes
        self._lock = threading.Lock()

    def get(self, key: str) -> Tensors | None:
        """Return the tensors, in host memory; None if there are none or they changed."""
        with self._lock:
            found = self._cached.get(key)
            if found is None:
                return None
            if _sums(found[0]) != found[1]:
                del self._cached[key]
                return None
            self._cached.move_to_end(key)
            return found[0]

    def put(self, key: str, encoded: Tensors) -> None:
        """Store a copy, and evict the entries that were not used for the longest time."""
        copy = {name: tensor.detach().cpu().clone() for name, tensor in encoded.items()}
        with self._lock:
            self._cached[key] = copy, _sums(copy)
            while len(self._cached) > 1 and self.nbytes > self._max_bytes:
                self._cached.popitem(last=False)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for encoded, _ in self._cached.values() for tensor in encoded.values())

    def clear(self) -> None:
        """Forget all entries, because something was computed that cannot be right."""
        with self._lock:
            self._cached.clear()


class TextOutputs:
    """The outputs of a text encoder for texts, taken from the cache if they are there.

    The attribute ``missing`` has, by cache key, the inputs that must be computed. ``cut`` is that of the inputs.
    """

    def __init__(self, call: TextEncoderCall, texts: Sequence[PromptText], cache: EmbeddingCache) -> None:
        inputs = call.inputs(texts)
        self._cache = cache
        self.cut = inputs.cut
        self._keys = {text: call.key(one) for text, one in inputs.each.items()}
        self._found = {key: cache.get(key) for key in self._keys.values()}
        all_again = inputs.padded_together and None in self._found.values()
        self.missing = {
            key: inputs.each[text] for text, key in self._keys.items() if all_again or self._found[key] is None
        }

    @property
    def missing_texts(self) -> list[PromptText]:
        """A text of each missing input, in the order of these."""
        text_of = {key: text for text, key in self._keys.items()}
        return [text_of[key] for key in self.missing]

    def add(self, computed: Sequence[Tensors]) -> None:
        """Add the outputs for the missing inputs, in their order, and store them in the cache."""
        for key, one in zip(self.missing, computed, strict=True):
            self._cache.put(key, one)
            self._found[key] = one

    def on(self, device: torch.device) -> dict[PromptText, Tensors]:
        """Return all outputs on a device, by text."""
        outputs: dict[PromptText, Tensors] = {}
        for text, key in self._keys.items():
            found = self._found[key]
            assert found is not None
            outputs[text] = {name: tensor.to(device) for name, tensor in found.items()}
        return outputs


def _sums(encoded: Tensors) -> list[str]:
    return [str(checksum_of(tensor)) for tensor in encoded.values()]


def conditions(
    family: Family, encoded: Mapping[str, Mapping[PromptText, Tensors]], prompts: Prompts, reads_negative: bool
) -> ConditionsByStep:
    """Return the conditions of all steps, from what each text encoder returned for each text.

    ``reads_negative``: the guidance reads the negative prompt.
    """
    model = family_model(family)
    distinct = [
        Condition(
            model.condition(encoded, PromptText("prompt", prompt)),
            model.condition(encoded, PromptText("negative", negative)) if reads_negative else None,
        )
        for prompt, negative in prompts.pairs
    ]
    return ConditionsByStep(distinct, prompts.index_by_step)
