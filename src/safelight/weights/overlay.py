"""Overlays: tensors computed from weights, owned by one binding, in their place. The weights are never written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from safelight.errors import BindingError


@dataclass(frozen=True, eq=False)
class Overlay:
    """A recipe: ``function`` makes a new tensor of the same shape and dtype from a weight, which it must not change.

    ``nbytes``: bytes of the new tensor, so that memory can be planned before it is made.
    """

    function: Callable[[torch.Tensor], torch.Tensor]
    nbytes: int

    def applied(self, weight: torch.Tensor) -> torch.Tensor:
        """The new tensor, at an aligned address. Raises BindingError when it is not like the weight."""
        made = self.function(weight)
        if made.shape != weight.shape or made.dtype != weight.dtype or made.device != weight.device:
            raise BindingError(
                f"an overlay made {made.dtype} {list(made.shape)} of a {weight.dtype} {list(weight.shape)}"
            )
        return made if made.untyped_storage() is not weight.untyped_storage() else made.clone()
