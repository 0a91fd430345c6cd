"""From prompts to the embeddings that a base's UNet reads, at each step; what was encoded is kept by its content."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from safelight.arch.compel_fence import Weighted
from safelight.arch.diffusers_fence import encoding
from safelight.arch.diffusers_fence.steering import Conditions
from safelight.devices.transfer import digest_of
from safelight.formats.layout import BASES
from safelight.prompts.editing import of_request
from safelight.prompts.tokens import Chunk, chunks
from safelight.prompts.words import Words
from safelight.request.run_settings import RunSettings
from safelight.request.schema import Request
from safelight.weights.digest import named
from safelight.weights.manifest import ComponentManifest
from safelight.weights.overlay import Adapted

Encoded = tuple[torch.Tensor, torch.Tensor | None]
"""Hidden states (1, 77 times chunks, width), and the pooled output (1, width) or None."""

KEPT_BYTES = 24 << 20
"""Most that is kept of what text encoders made, in host memory, where the ledger promises it: some forty prompts of
SDXL's."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """The texts of each step, those of a second pass behind the first's: what is drawn, and what is kept out."""

    prompt: Sequence[str]
    negative: Sequence[str]

    @classmethod
    def of(cls, request: Request) -> Prompts:
        """Raises RequestError for an edit that cannot be parsed."""
        if request.prompt_syntax == "compel":
            return cls([request.prompt] * request.steps_done, [request.negative] * request.steps_done)
        return cls(of_request(request, request.prompt, "prompt"), of_request(request, request.negative, "negative"))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The different ones, in the order of use."""
        return list(dict.fromkeys(zip(self.prompt, self.negative, strict=True)))

    @property
    def at(self) -> list[int]:
        """Which of the :attr:`pairs` holds at each step."""
        place = {pair: number for number, pair in enumerate(self.pairs)}
        return [place[pair] for pair in zip(self.prompt, self.negative, strict=True)]

    @property
    def texts(self) -> list[tuple[str, str]]:
        """(field, text), each once."""
        both = [("prompt", text) for text in self.prompt] + [("negative", text) for text in self.negative]
        return list(dict.fromkeys(both))


Text = tuple[Chunk, ...] | str
"""A prompt's chunks; compel's syntax as it is."""


def texts_of(base: str, role: str, request: Request, prompts: Prompts, words: Words) -> dict[tuple[str, str], Text]:
    """What a text encoder reads for each (field, text), as many chunks for one as for the others.

    Raises RequestError for what cannot be parsed.
    """
    if request.prompt_syntax == "compel":
        return {pair: pair[1] for pair in prompts.texts}
    pad = BASES[base].pad_ids[role]
    read = {(field, text): chunks(field, text, pad, words) for field, text in prompts.texts}
    empty = chunks("prompt", "", pad)
    most = max(len(one) for one in read.values())
    return {pair: (*one, *empty * (most - len(one))) for pair, one in read.items()}


@dataclass(frozen=True, slots=True)
class Reading:
    """How a text encoder reads: everything beside the text that its output depends on. ``among``: all texts, where
    each is made as long as the longest (compel)."""

    base: str
    role: str
    component: ComponentManifest
    run: RunSettings
    clip_skip: int
    words: Words
    syntax: str
    among: tuple[str, ...] = ()

    def key(self, text: Text) -> str:
        """The content of everything that goes in (STATE 13 and 14)."""
        run, over = self.run, self.component.over if isinstance(self.component, Adapted) else ""
        how = [run.device, run.hardware, run.dtype, run.attention, run.attention_slice_size, run.threads]
        read = text if isinstance(text, str) else [[chunk.ids, chunk.weights] for chunk in text]
        what = [self.base, self.role, self.component.digest, over, self.clip_skip, self.syntax]
        words = sorted(self.words.items()) if isinstance(text, str) else []
        return named(json.dumps([what, how, words, read, self.among, dict(run.versions)]))

    def encoded(self, encoder: nn.Module, texts: Sequence[Text], device: torch.device) -> list[Encoded]:
        """What the encoder makes of each: its chunks one behind another, pooled as the first is."""
        if self.syntax == "compel":
            pad = BASES[self.base].pad_ids[self.role]
            weighted = Weighted(encoder, self.role, self.base, self.clip_skip, self.words, pad, device)
            read = [weighted.encoded(text) for text in texts if isinstance(text, str)]
            return list(zip(weighted.padded([h for h, _ in read]), (pooled for _, pooled in read), strict=True))
        return [self._chunks(encoder, text, device) for text in texts if not isinstance(text, str)]

    def _chunks(self, encoder: nn.Module, text: Sequence[Chunk], device: torch.device) -> Encoded:
        read = [self._chunk(encoder, chunk, device) for chunk in text]
        return (torch.cat([hidden for hidden, _ in read], dim=1) if len(read) > 1 else read[0][0], read[0][1])

    def _chunk(self, encoder: nn.Module, chunk: Chunk, device: torch.device) -> Encoded:
        ids = torch.tensor([chunk.ids], device=device)
        hidden, pooled = encoding.read(encoder, self.role, self.base, ids, self.clip_skip)
        return (hidden if chunk.weights is None else _weighted(hidden, chunk.weights)), pooled


class Conditionings:
    """What text encoders made, by the content of everything that went in; the last used are kept, and each is summed
    before it is used again."""

    def __init__(self, most: int = KEPT_BYTES) -> None:
        self._kept: OrderedDict[str, tuple[Encoded, list[str]]] = OrderedDict()
        self._most = most
        self._lock = threading.Lock()

    def get(self, key: str) -> Encoded | None:
        """In host memory; None for what was not encoded, or is no longer what it was."""
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                return None
            if _sums(found[0]) != found[1]:
                del self._kept[key]
                return None
            self._kept.move_to_end(key)
            return found[0]

    def put(self, key: str, encoded: Encoded) -> None:
        """Keep a copy, and let go of the longest unused."""
        hidden, pooled = (None if tensor is None else tensor.detach().cpu().clone() for tensor in encoded)
        assert hidden is not None
        with self._lock:
            self._kept[key] = (hidden, pooled), _sums((hidden, pooled))
            while len(self._kept) > 1 and self.nbytes > self._most:
                self._kept.popitem(last=False)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for encoded, _ in self._kept.values() for tensor in encoded if tensor is not None)

    def clear(self) -> None:
        """Forget all: something was computed that cannot be."""
        with self._lock:
            self._kept.clear()


def _sums(encoded: Encoded) -> list[str]:
    return [str(digest_of(tensor)) for tensor in encoded if tensor is not None]


def _weighted(hidden: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Each token's state times its weight, the mean of all as it was: AUTOMATIC1111's emphasis."""
    wide = hidden.float()
    scaled = wide * torch.tensor(weights, device=wide.device).view(1, -1, 1)
    return (scaled * (wide.mean() / scaled.mean())).to(hidden.dtype)


def assemble(base: str, encoded: Mapping[str, Mapping[tuple[str, str], Encoded]], prompts: Prompts) -> Conditions:
    """The pipeline's arguments for each different pair of prompts, from what each encoder gave for (field, text)."""
    pairs = [_pair(base, encoded, prompt, negative) for prompt, negative in prompts.pairs]
    return Conditions(pairs, prompts.at)


def _pair(
    base: str, encoded: Mapping[str, Mapping[tuple[str, str], Encoded]], prompt: str, negative: str
) -> dict[str, torch.Tensor]:
    """SDXL was trained with zeros in place of an empty prompt, so an empty negative prompt becomes zeros."""
    yes, no = ("prompt", prompt), ("negative", negative)
    if base != "sdxl":
        of = encoded["text_encoder"]
        return {"prompt_embeds": of[yes][0], "negative_prompt_embeds": of[no][0]}
    first, second = encoded["text_encoder"], encoded["text_encoder_2"]
    hidden, kept_out = (torch.cat([first[which][0], second[which][0]], dim=-1) for which in (yes, no))
    pooled, negative_pooled = second[yes][1], second[no][1]
    assert pooled is not None
    assert negative_pooled is not None
    if not negative:
        kept_out, negative_pooled = torch.zeros_like(hidden), torch.zeros_like(pooled)
    return {
        "prompt_embeds": hidden,
        "negative_prompt_embeds": kept_out,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": negative_pooled,
    }
