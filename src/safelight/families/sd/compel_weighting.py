"""Weights prompts as compel 2.5.1 does, which InvokeAI uses (https://github.com/damian0815/compel).

A weight above 1 moves a token's hidden state away from that of the empty prompt. A weight below 1 mixes in what the
text encoder makes of the prompt when it cannot see the fragment. The tests compare the hidden states with compel's, bit
for bit. There is one difference: a fragment without words, as in ``""0.5``, changes nothing; compel raises TypeError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from safelight.families.sd.encoding import EncoderOutput
from safelight.request.prompts import compel_grammar as grammar
from safelight.request.prompts.compel_grammar import Blend, Fragment, Phrase
from safelight.request.prompts.tokens import END, POSITIONS, START, TOKENS_PER_CHUNK, tokens_of, vocabulary
from safelight.request.prompts.words import InversionTokens, cut

RunEncoder = Callable[[torch.Tensor, torch.Tensor | None], EncoderOutput]

SMALLEST_WEIGHT = 1e-5

_ENDS = ((".</w>",), (".</w>", ",</w>", ";</w>", ":</w>"), ("</w>",))
"""Where a long prompt is cut: behind the end of a sentence, else of a phrase, else of a word. A whole token of
punctuation, and any token with the mark ``</w>``, which ends a word."""


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The tokens of a phrase, in chunks of :data:`POSITIONS`.

    ``ids``, ``weights``: of each position.
    ``places``: the first and the last position of each fragment; None for a fragment without tokens.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    places: Sequence[tuple[int, int] | None]


class CompelEncoder:
    """Encodes prompts in compel's syntax.

    ``run_encoder``: runs the text encoder on token ids and a mask.
    ``dtype``: the encoder's.
    ``inversion_tokens``: token ids by word of a textual inversion.
    ``pooled``: also return the pooled output of the plain text.
    """

    def __init__(
        self,
        run_encoder: RunEncoder,
        dtype: torch.dtype,
        inversion_tokens: InversionTokens,
        pad_id: int,
        device: torch.device,
        pooled: bool,
    ) -> None:
        self._run_encoder = run_encoder
        self._dtype = dtype
        self._inversion_tokens = inversion_tokens
        self._pad_id = pad_id
        self._device = device
        self._pooled = pooled
        self._empty: torch.Tensor | None = None

    def encoded(self, text: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode a prompt: hidden states (1, 77 * chunks, width), and the plain text's pooled output or None."""
        prompt = grammar.parse(text)
        empty_phrase = self._phrase(grammar.EMPTY) if any(weight != 1 for weight in prompt.weights) else None
        parts: list[torch.Tensor] = []
        for part, weight in zip(prompt.parts, prompt.weights, strict=True):
            states = self._blend(part) if isinstance(part, Blend) else self._phrase(part)
            if weight != 1 and empty_phrase is not None:
                empty = self.padded([empty_phrase, states])[0]
                states = empty + (states - empty) * weight
            parts.append(states)
        return torch.concat(parts, dim=1), self._pooled_output(text) if self._pooled else None

    def padded(self, hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Pad all hidden states to the length of the longest, with those of an empty prompt."""
        longest = max(states.shape[1] for states in hidden)
        missing = [(longest - states.shape[1]) // POSITIONS for states in hidden]
        return [
            torch.cat([states, *[self._empty_states()] * count], dim=1) if count else states
            for states, count in zip(hidden, missing, strict=True)
        ]

    def _pooled_output(self, text: str) -> torch.Tensor | None:
        ids = self._chunk(self._ids(text)[:TOKENS_PER_CHUNK])
        return self._run_encoder(torch.tensor([ids], device=self._device), None)[1]

    def _empty_states(self) -> torch.Tensor:
        if self._empty is None:
            ids = torch.tensor([self._chunk([])], dtype=torch.int, device=self._device)
            self._empty = self._run_encoder(ids, None)[0]
        return self._empty

    def _blend(self, blend: Blend) -> torch.Tensor:
        states = self.padded([self._phrase(phrase) for phrase in blend.phrases])
        return _weighted_sum(torch.cat(states), blend.weights, blend.normalized)

    def _phrase(self, phrase: Phrase) -> torch.Tensor:
        tokens = self._tokens(phrase.fragments)
        mask = torch.ones_like(tokens.ids)
        states, weights = [self._weighted(tokens, mask)], [1.0]
        for fragment, place in zip(phrase.fragments, tokens.places, strict=True):
            if fragment.weight < 1 and place is not None:
                states.append(self._weighted(tokens, _without(mask, place)))
                # A weight of 1 gives 0, 0.5 gives 1, and 0 gives infinity.
                weights.append(math.tan((1.0 - max(SMALLEST_WEIGHT, fragment.weight)) * math.pi / 2))
        return _weighted_sum(torch.cat(states), weights, normalized=True).to(dtype=self._dtype)

    def _weighted(self, tokens: _Tokens, mask: torch.Tensor) -> torch.Tensor:
        """Encode each chunk, and weight its hidden states (1, 77 * chunks, width)."""
        parts: list[torch.Tensor] = []
        for at in range(0, len(tokens.ids), POSITIONS):
            here = slice(at, at + POSITIONS)
            states = self._run_encoder(tokens.ids[here].unsqueeze(0), mask[here].unsqueeze(0))[0]
            weights = tokens.weights[here].unsqueeze(-1).expand(states.shape)
            plain = weights == 1
            if not torch.all(plain):
                empty = self._empty_states()
                # Where the weight is 1, the sum could differ by its rounding.
                states = torch.where(plain, states, empty + (states - empty) * weights)
            parts.append(states)
        return torch.cat(parts, dim=1)

    def _tokens(self, fragments: Sequence[Fragment]) -> _Tokens:
        rest = [(token, n) for n, fragment in enumerate(fragments) for token in self._ids(fragment.text)]
        ids: list[int] = []
        weights: list[float] = []
        positions: list[list[int]] = [[] for _ in fragments]
        while True:
            length = _chunk_length([token for token, _ in rest])
            chunk, rest = rest[:length], rest[length:]
            for position, (_, n) in enumerate(chunk, len(ids) + 1):
                positions[n].append(position)
            ids += self._chunk([token for token, _ in chunk])
            weights += [1.0, *(fragments[n].weight for _, n in chunk)]
            weights += [1.0] * (len(ids) - len(weights))
            if not rest:
                break
        return _Tokens(
            torch.tensor(ids, dtype=torch.long, device=self._device),
            torch.tensor(weights, dtype=torch.float32, device=self._device),
            [(found[0], found[-1]) if found else None for found in positions],
        )

    def _ids(self, text: str) -> list[int]:
        pieces = cut(text, self._inversion_tokens)
        return [token for piece in pieces for token in (piece if isinstance(piece, tuple) else tokens_of(piece))]

    def _chunk(self, ids: Sequence[int]) -> list[int]:
        """Return token ids with a start token, an end token, and padding to :data:`POSITIONS`."""
        return [START, *ids, END, *[self._pad_id] * (TOKENS_PER_CHUNK - len(ids))]


def _chunk_length(ids: Sequence[int]) -> int:
    """Return how many tokens belong to the next chunk."""
    if len(ids) <= TOKENS_PER_CHUNK:
        return TOKENS_PER_CHUNK
    known = vocabulary()
    texts = [known[token] for token in ids[:TOKENS_PER_CHUNK]]
    for ends in _ENDS:
        for at in reversed(range(len(texts))):
            if texts[at] in ends or (ends == _ENDS[-1] and texts[at].endswith(ends)):
                return at + 1
    return TOKENS_PER_CHUNK


def _without(mask: torch.Tensor, place: tuple[int, int]) -> torch.Tensor:
    """Return the mask without a fragment. The first and the last position of each chunk stay visible."""
    out = mask.clone()
    out[place[0] : place[1] + 1] = 0
    out[0::POSITIONS] = 1
    out[POSITIONS - 1 :: POSITIONS] = 1
    return out


def _weighted_sum(states: torch.Tensor, weights: Sequence[float], normalized: bool) -> torch.Tensor:
    """Return the weighted sum (1, positions, width) of hidden states (count, positions, width)."""
    factors = torch.tensor(weights, dtype=states.dtype, device=states.device)
    if normalized:
        factors = factors / torch.sum(factors)
    return torch.sum(states.unsqueeze(0) * factors.reshape(-1, 1, 1), dim=1)
