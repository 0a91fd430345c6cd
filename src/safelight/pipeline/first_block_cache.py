"""First-block caching: a call of the denoiser is cut short when its first block does about what it did before.

If what the first block adds is close to what it added in the last full call, the other blocks are not computed. What
they added together in that call is added again. This changes the image; a request asks for it by a threshold.
The arithmetic is that of diffusers' ``FirstBlockCacheConfig``.
Source: https://github.com/huggingface/diffusers/blob/main/src/diffusers/hooks/first_block_cache.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from safelight.errors import RequestError

BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks", "layers")
"""The names of a denoiser's lists of blocks in diffusers, in the order in which they are computed."""

_TEXT = "encoder_hidden_states"

Forward = Callable[..., Any]


@dataclass(slots=True)
class _Stream:
    """The tensors between two blocks. ``text``: None if they are one tensor with the image's."""

    image: torch.Tensor
    text: torch.Tensor | None

    @classmethod
    def before(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Stream:
        """Return what a block is called with."""
        return cls(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], kwargs.get(_TEXT))

    @classmethod
    def after(cls, output: Any) -> _Stream:
        """Return what a block returned."""
        return cls(output[1], output[0]) if isinstance(output, tuple) else cls(output, None)

    def as_output(self) -> Any:
        return self.image if self.text is None else (self.text, self.image)

    def split_like(self, other: _Stream) -> _Stream:
        """Return the tensors in two where ``other`` has two: FLUX.2's last blocks have the text before the image."""
        if self.text is not None or other.text is None:
            return self
        length = other.text.shape[1]
        return _Stream(self.image[:, length:], self.image[:, :length])

    def plus(self, other: _Stream) -> _Stream:
        text = None if self.text is None or other.text is None else self.text + other.text
        return _Stream(self.image + other.image, text)

    def minus(self, other: _Stream) -> _Stream:
        text = None if self.text is None or other.text is None else self.text - other.text
        return _Stream(self.image - other.image, text)


@dataclass(slots=True)
class _Row:
    """What is known of one row of the denoiser's calls.

    ``first``: what the first block returned in the last full call.
    ``added``: what it added to the image's tensor.
    ``others``: what the other blocks added.
    ``skips``: the present call is cut short.
    """

    first: _Stream | None = None
    added: torch.Tensor | None = None
    others: _Stream | None = None
    skips: bool = False


class FirstBlockCache:
    """Cuts calls of a denoiser short, for one image.

    ``threshold``: the largest mean difference of what the first block adds, by its mean size.

    The attribute ``skipped`` says how many calls were cut short; one call computes one row.
    """

    def __init__(self, denoiser: nn.Module, threshold: float) -> None:
        self._threshold = threshold
        self._rows: dict[int, _Row] = {}
        self._row = _Row()
        self.skipped = 0
        children = dict(denoiser.named_children())
        self._blocks = [block for name in BLOCK_LISTS if name in children for block in children[name].children()]
        if len(self._blocks) < 2:
            raise RequestError("first_block_cache", threshold, "needs a denoiser with at least two blocks")

    @contextlib.contextmanager
    def applied(self) -> Generator[None]:
        """Replace the methods of the denoiser's blocks within the context."""
        first, *middle, last = self._blocks
        changed = [(first, self._first), *((block, self._middle) for block in middle), (last, self._last)]
        try:
            for block, wrap in changed:
                block.forward = wrap(block.forward)
            yield
        finally:
            for block, _ in changed:
                block.__dict__.pop("forward", None)
            self._rows.clear()

    def begin_row(self, number: int) -> None:
        """Say which row the next call of the denoiser computes."""
        self._row = self._rows.setdefault(number, _Row())

    def _first(self, forward: Forward) -> Forward:
        def compute(*args: Any, **kwargs: Any) -> Any:
            before = _Stream.before(args, kwargs).image
            output = forward(*args, **kwargs)
            row, after = self._row, _Stream.after(output)
            added = after.image - before
            row.skips = row.others is not None and self._is_close(added, row.added)
            if row.skips and row.others is not None:
                self.skipped += 1
                return after.plus(row.others).as_output()
            row.first, row.added = after, added
            return output

        return compute

    def _middle(self, forward: Forward) -> Forward:
        def compute(*args: Any, **kwargs: Any) -> Any:
            return _Stream.before(args, kwargs).as_output() if self._row.skips else forward(*args, **kwargs)

        return compute

    def _last(self, forward: Forward) -> Forward:
        def compute(*args: Any, **kwargs: Any) -> Any:
            row = self._row
            if row.skips:
                return _Stream.before(args, kwargs).as_output()
            output = forward(*args, **kwargs)
            assert row.first is not None
            row.others = _Stream.after(output).split_like(row.first).minus(row.first)
            return output

        return compute

    def _is_close(self, added: torch.Tensor, before: torch.Tensor | None) -> bool:
        assert before is not None
        difference = (added - before).abs().mean() / before.abs().mean()
        return difference.item() <= self._threshold
