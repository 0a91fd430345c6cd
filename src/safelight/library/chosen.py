"""From the adapters that a request names to what they do to its model: found, compared with it, pinned. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from safelight.errors import IntegrityError, ModelNotFoundError, RequestError, UnsupportedModelError
from safelight.formats import layout
from safelight.formats.adapter import VAE
from safelight.formats.keys.adapters import AdapterConfig, Fit, Module, fit, spellings
from safelight.formats.keys.vae import VAEConfig
from safelight.formats.layout import ComponentConfig
from safelight.library.adapters import Adapters
from safelight.library.inputs import Inputs
from safelight.library.library import Library
from safelight.library.model import Adapter, Model
from safelight.prompts import loras
from safelight.types import Lora, Request
from safelight.weights.manifest import ComponentManifest

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
class Shelves:
    """Where what a request names is found."""

    library: Library
    adapters: Adapters
    inputs: Inputs

    @classmethod
    def under(cls, root: Path) -> Shelves:
        return cls(Library(root), Adapters(root), Inputs(root))


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


@dataclass(frozen=True, slots=True)
class Settled:
    """``request``: everything in it pinned to its content. ``loras``: what they do. ``vae``: what takes the place of
    the model's own, None for nothing."""

    request: Request
    loras: tuple[Chosen, ...] = ()
    vae: ComponentManifest | None = None


def settled(request: Request, model: Model, shelves: Shelves, by_path: bool = True) -> Settled:
    """The request with the adapters of its prompts among its ``loras``, each pinned to its content, and its images kept
    and named by theirs; and what the adapters do.

    ``by_path``: whether adapters, VAEs and images may be named by a path. Raises RequestError, naming what fits
    nothing, for an adapter that is not the model's, and for what is no image; ModelNotFoundError; IntegrityError for
    other content than was asked for.
    """
    prompt, inside = loras.taken("prompt", request.prompt)
    negative, also = loras.taken("negative", request.negative)
    chosen = tuple(
        _one(lora, model, shelves.adapters, by_path, request.lenient) for lora in (*request.loras, *inside, *also)
    )
    given: dict[str, Any] = {
        field: shelves.inputs.taken(field, value, by_path)
        for field, value in (("image", request.image), ("mask", request.mask))
        if value
    }
    if request.image and request.mask_padding is None:
        # The size that is drawn is the image's, in whole latents, where none is asked for.
        sides = [max(_LATENT, side // _LATENT * _LATENT) for side in shelves.inputs.open(given["image"]).size]
        given |= {"width": request.width or sides[0], "height": request.height or sides[1]}
    vae = _vae(request, model, shelves, by_path) if request.vae else None
    if vae is not None:
        given["vae_digest"] = vae.digest
    pinned = replace(request, prompt=prompt, negative=negative, loras=tuple(c.lora for c in chosen), **given)
    return Settled(pinned, chosen, vae)


def _vae(request: Request, model: Model, shelves: Shelves, by_path: bool) -> ComponentManifest:
    """The VAE that a request names: of a file of its own, or of another model of a kindred base."""
    alone = _vae_alone(request.vae, shelves, by_path)
    if alone is not None:
        found = alone
    else:
        of = shelves.library.resolve(request.vae) if by_path else shelves.library.get(request.vae)
        if of.base.startswith("sdxl") != model.base.startswith("sdxl"):
            raise RequestError("vae", request.vae, f"is the VAE of a {of.base} model; {model.name} is {model.base}")
        found = shelves.library.checked(of).manifest.component("vae")
    if request.vae_digest and found.digest != request.vae_digest:
        path = found.tensors[0].path
        raise IntegrityError(path, "", f"the VAE {request.vae} has other content than {request.vae_digest[:10]}")
    config, own = found.config, model.manifest.component("vae").config
    assert isinstance(config, VAEConfig)
    assert isinstance(own, VAEConfig)
    if (config.latent_channels, len(config.block_out_channels)) != (own.latent_channels, len(own.block_out_channels)):
        raise RequestError("vae", request.vae, f"its latents are not those of {model.name}")
    return found


def _vae_alone(name: str, shelves: Shelves, by_path: bool) -> ComponentManifest | None:
    """The VAE of that name or path that has a file of its own, None when there is none."""
    try:
        found = shelves.adapters.resolve(name) if by_path else shelves.adapters.get(name)
    except (ModelNotFoundError, UnsupportedModelError):
        return None
    if found.kind != VAE:
        raise RequestError("vae", name, f"is a {found.kind}, not a VAE")
    return shelves.adapters.checked(found).tensors


def _one(lora: Lora, model: Model, adapters: Adapters, by_path: bool, lenient: bool) -> Chosen:
    if lora.digest:
        adapter = adapters.find(lora.name, lora.digest, by_path)
    else:
        adapter = adapters.checked(adapters.resolve(lora.name) if by_path else adapters.get(lora.name))
    if adapter.kind == VAE:
        raise RequestError("loras", lora.name, "is a VAE: ask for it as vae")
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
    pinned = replace(lora, name=lora.name if adapter.origin == "path" else adapter.name, digest=adapter.digest)
    return Chosen(adapter, pinned, found)


def _configs(model: Model) -> tuple[tuple[str, ComponentConfig], ...]:
    return tuple((component.role, component.config) for component in model.manifest.components)


@lru_cache(maxsize=16)
def _spelled(configs: tuple[tuple[str, ComponentConfig], ...]) -> Mapping[str, Module]:
    return spellings({role: layout.rows(config) for role, config in configs})
