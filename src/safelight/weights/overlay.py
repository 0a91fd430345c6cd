"""Overlays: what is computed from weights and takes their place. The weights themselves are never written.

A component with something over it is a component of its own, named by the content of both: its segments are made from
the base's bytes whenever they are wanted, kept and evicted as any others, and shared with the base where nothing lies
over them. Taking an adapter off is using the base again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from safelight.errors import BindingError
from safelight.weights.manifest import ComponentManifest


@dataclass(frozen=True, eq=False)
class Overlay:
    """A recipe: ``function`` makes a new tensor of the same shape and dtype from a weight, which it must not change."""

    function: Callable[[torch.Tensor], torch.Tensor]

    def applied(self, weight: torch.Tensor) -> torch.Tensor:
        """The new tensor. Raises BindingError when it is not like the weight."""
        made = self.function(weight)
        if made.shape != weight.shape or made.dtype != weight.dtype or made.device != weight.device:
            raise BindingError(
                f"an overlay made {made.dtype} {list(made.shape)} of a {weight.dtype} {list(weight.shape)}"
            )
        return made if made.untyped_storage() is not weight.untyped_storage() else made.clone()


Recipes = Callable[[], AbstractContextManager[Mapping[str, Overlay]]]
"""Opens what the overlays are computed from, and gives them by the name of the weight they lie over."""


@dataclass(frozen=True, slots=True, eq=False)
class Adapted(ComponentManifest):
    """``digest`` and all else is the base's. ``over``: the content (BLAKE3, hex) of what lies over it, strengths
    included; ``touched``: the tensors over which something lies; ``working``: bytes that making one of them takes;
    ``sources``: digests of the components from which it is computed."""

    over: str
    touched: frozenset[str]
    recipes: Recipes
    working: int
    sources: tuple[str, ...]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Adapted) or (other.digest, other.over) != (self.digest, self.over):
            return False
        # The same content may lie in another file by now.
        return other.tensors == self.tensors

    def __hash__(self) -> int:
        return hash((self.role, self.digest, self.over))


def adapted(
    base: ComponentManifest,
    over: str,
    touched: frozenset[str],
    recipes: Recipes,
    working: int = 0,
    sources: tuple[str, ...] = (),
) -> Adapted:
    """The base with overlays: see :class:`Adapted`."""
    return Adapted(base.role, base.config, base.tensors, base.digest, over, touched, recipes, working, sources)


def digests(component: ComponentManifest) -> tuple[str, ...]:
    """Of everything from which a component is made."""
    return (component.digest, *component.sources) if isinstance(component, Adapted) else (component.digest,)
