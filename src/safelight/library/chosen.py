"""From the adapters that a request names to what they do to its model: found, compared with it, pinned. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from safelight.errors import RequestError
from safelight.formats import layout
from safelight.formats.keys.adapters import AdapterConfig, Fit, Module, fit, spellings
from safelight.formats.layout import ComponentConfig
from safelight.library.adapters import Adapters
from safelight.library.inputs import Inputs
from safelight.library.model import Adapter, Model
from safelight.prompts import loras
from safelight.types import Lora, Request

_BLOCKS: Mapping[int, tuple[str, ...]] = {
    26: ("BASE", *(f"IN{n:02d}" for n in range(12)), "M00", *(f"OUT{n:02d}" for n in range(12))),
    17: (
        "BASE",
        *(f"IN{n:02d}" for n in (1, 2, 4, 5, 7, 8)),
        "M00",
        *(f"OUT{n:02d}" for n in range(3, 12)),
    ),
    20: ("BASE", *(f"IN{n:02d}" for n in range(9)), "M00", *(f"OUT{n:02d}" for n in range(9))),
    12: ("BASE", *(f"IN{n:02d}" for n in (4, 5, 7, 8)), "M00", *(f"OUT{n:02d}" for n in range(6))),
}
"""The blocks that block weights count (sd-webui-lora-block-weight); one that is not among them gets none."""

_SHOWN = 5

_LATENT = 8
"""Pixels a side of a latent."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """An adapter of a request, and what it does to the request's model."""

    adapter: Adapter
    lora: Lora
    fit: Fit

    def strength(self, role: str, block: str) -> float:
        """On a component, in a block of its UNet."""
        factors = dict(zip(_BLOCKS[len(self.lora.blocks)], self.lora.blocks, strict=True)) if self.lora.blocks else None
        return self.lora.on(role) * (1.0 if factors is None else factors.get(block, 0.0))

    def scale(self, role: str) -> float | None:
        config = self.adapter.tensors.config
        assert isinstance(config, AdapterConfig)
        return config.scale(role)


def settled(
    request: Request, model: Model, adapters: Adapters, inputs: Inputs, by_path: bool = True
) -> tuple[Request, tuple[Chosen, ...]]:
    """The request with the adapters of its prompts among its ``loras``, each pinned to its content, and its images kept
    and named by theirs; and what the adapters do.

    ``by_path``: whether adapters and images may be named by a path. Raises RequestError, naming what fits nothing, for
    an adapter that is not the model's, and for what is no image; ModelNotFoundError; IntegrityError for other content
    than was asked for.
    """
    prompt, inside = loras.taken("prompt", request.prompt)
    negative, also = loras.taken("negative", request.negative)
    chosen = tuple(_one(lora, model, adapters, by_path, request.lenient) for lora in (*request.loras, *inside, *also))
    given: dict[str, Any] = {
        field: inputs.taken(field, value, by_path)
        for field, value in (("image", request.image), ("mask", request.mask))
        if value
    }
    if request.image and request.mask_padding is None:
        # The size that is drawn is the image's, in whole latents, where none is asked for.
        sides = [max(_LATENT, side // _LATENT * _LATENT) for side in inputs.open(given["image"]).size]
        given |= {"width": request.width or sides[0], "height": request.height or sides[1]}
    pinned = replace(request, prompt=prompt, negative=negative, loras=tuple(c.lora for c in chosen), **given)
    return pinned, chosen


def _one(lora: Lora, model: Model, adapters: Adapters, by_path: bool, lenient: bool) -> Chosen:
    if lora.digest:
        adapter = adapters.find(lora.name, lora.digest)
    else:
        adapter = adapters.checked(adapters.resolve(lora.name) if by_path else adapters.get(lora.name))
    if adapter.base and adapter.base != model.base:
        raise RequestError("loras", lora.name, f"is a {adapter.kind} for {adapter.base}; {model.name} is {model.base}")
    if lora.blocks and (len(lora.blocks) in (12, 20)) != (model.base == "sdxl"):
        wanted = "12 or 20" if model.base == "sdxl" else "17 or 26"
        raise RequestError("loras", lora.name, f"{len(lora.blocks)} block weights; {model.base} has {wanted}")
    found = fit({tensor.name: tensor.shape for tensor in adapter.tensors.tensors}, _spelled(_configs(model)))
    if found.odd or not found.count:
        what = "; ".join(found.odd[:_SHOWN]) or f"none of its {len(found.unknown)} tensors"
        raise RequestError("loras", lora.name, f"does not fit {model.name} ({model.base}): {what}")
    if found.unknown and not lenient:
        some = ", ".join(found.unknown[:_SHOWN]) + (", …" if len(found.unknown) > _SHOWN else "")
        problem = f"{len(found.unknown)} of its tensors fit nothing in {model.name}: {some}"
        raise RequestError("loras", lora.name, f"{problem} (lenient leaves them out)")
    pinned = replace(lora, name=adapter.name if adapter.origin == "added" else lora.name, digest=adapter.digest)
    return Chosen(adapter, pinned, found)


def _configs(model: Model) -> tuple[tuple[str, ComponentConfig], ...]:
    return tuple((component.role, component.config) for component in model.manifest.components)


@lru_cache(maxsize=16)
def _spelled(configs: tuple[tuple[str, ComponentConfig], ...]) -> Mapping[str, Module]:
    return spellings({role: layout.rows(config) for role, config in configs})
