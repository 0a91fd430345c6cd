"""From the adapters that a request names to what they do to its model: found, compared with it, pinned. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from safelight.errors import RequestError
from safelight.families.family import CONTROLNET, Config, Family
from safelight.families.registry import family
from safelight.library import inversions as inverted
from safelight.library import parts, paths
from safelight.library.adapters import Adapters
from safelight.library.inputs import Inputs
from safelight.library.inversions import Inversion
from safelight.library.library import Library
from safelight.library.model import Adapter, Model
from safelight.prompts import loras, tags
from safelight.prompts.words import Words
from safelight.request.parts import Lora
from safelight.request.schema import MOST_PIXELS, Request
from safelight.weights.adapter_file import INVERSION, VAE
from safelight.weights.adapter_kinds import WEIGHTS
from safelight.weights.adapter_parts import AdapterConfig, Fit, Module, fit, spellings
from safelight.weights.manifest import ComponentManifest

_ASKED = {VAE: "vae", CONTROLNET: "controls (--control)", INVERSION: "a word in the prompt"}

_SHOWN = 5

_SHAPE = 0.03
"""By how much a mask's shape may differ from the image's: a rounding of small ones."""


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
class ResolvedLora:
    """An adapter of a request, and what it does to the request's model."""

    adapter: Adapter
    lora: Lora
    fit: Fit
    family: Family

    def strength(self, role: str, block: str) -> float:
        """Return the strength on a component, in a block of the denoiser."""
        counted = self.family.block_counts.get(len(self.lora.blocks), ())
        factors = dict(zip(counted, self.lora.blocks, strict=True)) if self.lora.blocks else None
        # Blocks that the block weights do not count get none.
        return self.lora.on(self.family.purpose(role)) * (1.0 if factors is None else factors.get(block, 0.0))

    def scale(self, role: str) -> float | None:
        config = self.adapter.tensors.config
        assert isinstance(config, AdapterConfig)
        return config.scale(self.family.component(role))


@dataclass(frozen=True, slots=True)
class Settled:
    """``request``: everything in it pinned to its content. ``loras``: what they do. ``own``: components that take the
    place of the model's own. ``controls``: ControlNets, in the order of the request's. ``inversions``: words of the
    prompts that stand for vectors."""

    request: Request
    loras: tuple[ResolvedLora, ...] = ()
    own: tuple[ComponentManifest, ...] = ()
    controls: tuple[Adapter, ...] = ()
    inversions: tuple[Inversion, ...] = ()

    @property
    def words(self) -> Words:
        return {one.embedding.word: one.tokens for one in self.inversions}

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """All whose files this depends on."""
        return (*(one.adapter for one in self.loras), *self.controls, *(one.adapter for one in self.inversions))


def settled(request: Request, model: Model, shelves: Shelves, by_path: bool = True) -> Settled:
    """The request with the adapters of its prompts among its ``loras``, each pinned to its content, and its images kept
    and named by theirs; and what the adapters do.

    ``by_path``: whether adapters, VAEs and images may be named by a path. Raises RequestError, naming what fits
    nothing, for an adapter that is not the model's, and for what is no image; ModelNotFoundError; IntegrityError for
    other content than was asked for.
    """
    for field, text in (("prompt", request.prompt), ("negative", request.negative)):
        tags.refuse_unknown(field, text, request.prompt_syntax)
    prompt, inside = loras.taken("prompt", request.prompt)
    negative, also = loras.taken("negative", request.negative)
    chosen = tuple(
        _one(lora, model, shelves.adapters, by_path, request.lenient) for lora in (*request.loras, *inside, *also)
    )
    given = _pictures(request, shelves, by_path, model.family.latents.multiple)
    own: list[ComponentManifest] = []
    if request.vae:
        own.append(parts.vae(request, model, shelves.library, shelves.adapters, by_path))
        given |= {"vae": paths.name_of(request.vae), "vae_digest": own[0].digest}
    if request.text_encoder:
        encoders = parts.text_encoders(request, model, shelves.library, by_path)
        own += encoders
        given |= {
            "text_encoder": paths.name_of(request.text_encoder),
            "text_encoder_digest": parts.digest_of(encoders),
        }
    nets = [parts.controlnet(control, model, shelves.adapters, by_path) for control in request.controls]
    given["controls"] = tuple(
        replace(
            control,
            name=net.name,
            image=shelves.inputs.taken("controls", control.image, by_path),
            digest=net.digest,
        )
        for control, net in zip(request.controls, nets, strict=True)
    )
    pinned = replace(request, prompt=prompt, negative=negative, loras=tuple(c.lora for c in chosen), **given)
    inversions = inverted.chosen(pinned, model, shelves.adapters, by_path)
    pinned = replace(pinned, embeddings=tuple(one.embedding for one in inversions))
    return Settled(pinned, chosen, tuple(own), tuple(nets), inversions)


def _pictures(request: Request, shelves: Shelves, by_path: bool, multiple: int) -> dict[str, Any]:
    """The image and the mask by their digests, and the size that is drawn: the image's, in whole latents, where none is
    asked for."""
    given: dict[str, Any] = {
        field: shelves.inputs.taken(field, value, by_path)
        for field, value in (("image", request.image), ("mask", request.mask))
        if value
    }
    if not request.image:
        return given
    width, height = shelves.inputs.size(given["image"])
    if request.mask:
        _refuse_other_shape(request.mask, shelves.inputs.size(given["mask"]), (width, height))
    left, top, right, bottom = request.outpaint or (0, 0, 0, 0)
    if request.outpaint:
        # In whole latents, so that the picture itself is not scaled.
        right, bottom = right + -(left + width + right) % multiple, bottom + -(top + height + bottom) % multiple
        given["outpaint"] = (left, top, right, bottom)
    whole = left + width + right, top + height + bottom
    if whole[0] * whole[1] > MOST_PIXELS:
        raise RequestError("outpaint", request.outpaint, f"makes the image over {MOST_PIXELS} pixels")
    if request.mask_padding is None:
        sides = [max(multiple, side // multiple * multiple) for side in whole]
        given |= {"width": request.width or sides[0], "height": request.height or sides[1]}
    return given


def _refuse_other_shape(name: str, mask: tuple[int, int], image: tuple[int, int]) -> None:
    """A mask may be smaller or larger than the image; of another shape, it is another image's."""
    if abs(mask[0] * image[1] - mask[1] * image[0]) > _SHAPE * mask[1] * image[0]:
        problem = f"is {mask[0]}x{mask[1]}, which is not the shape of the image, {image[0]}x{image[1]}"
        raise RequestError("mask", name[:80], problem)


def _one(lora: Lora, model: Model, adapters: Adapters, by_path: bool, lenient: bool) -> ResolvedLora:
    if lora.digest:
        adapter = adapters.find(lora.name, lora.digest, by_path)
    else:
        adapter = adapters.checked(adapters.resolve(lora.name) if by_path else adapters.get(lora.name))
    if adapter.kind not in WEIGHTS:
        way = (
            f"ask for it as {_ASKED[adapter.kind]}" if adapter.kind in _ASKED else "no installed package has this kind"
        )
        raise RequestError("loras", lora.name, f"is a {adapter.kind}: {way}")
    # If the package of the kind does not load, its own error is clearer than that no tensor fits.
    _ = WEIGHTS[adapter.kind]
    if adapter.base and adapter.base != model.base:
        raise RequestError("loras", lora.name, f"is a {adapter.kind} for {adapter.base}; {model.name} is {model.base}")
    of = model.family
    if lora.blocks and len(lora.blocks) not in of.block_counts:
        wanted = " or ".join(map(str, sorted(of.block_counts))) or "none"
        raise RequestError("loras", lora.name, f"{len(lora.blocks)} block weights; {model.base} has {wanted}")
    shapes = {tensor.name: tensor.shape for tensor in adapter.tensors.tensors}
    found = fit(shapes, _spelled(model.base, _configs(model)))
    if found.odd or not found.count:
        what = "; ".join(found.odd[:_SHOWN]) or f"none of its {len(found.unknown)} tensors"
        raise RequestError("loras", lora.name, f"does not fit {model.name} ({model.base}): {what}")
    if found.unknown and not lenient:
        some = ", ".join(found.unknown[:_SHOWN]) + (", …" if len(found.unknown) > _SHOWN else "")
        problem = f"{len(found.unknown)} of its tensors fit nothing in {model.name}: {some}"
        raise RequestError("loras", lora.name, f"{problem} (lenient leaves them out)")
    return ResolvedLora(adapter, replace(lora, name=adapter.name, digest=adapter.digest), found, of)


def _configs(model: Model) -> tuple[tuple[str, Config], ...]:
    return tuple((component.role, component.config) for component in model.manifest.components)


@lru_cache(maxsize=16)
def _spelled(base: str, configs: tuple[tuple[str, Config], ...]) -> Mapping[str, Module]:
    of = family(base)
    return spellings((of.component(role), config.rows()) for role, config in configs if role in of.roles)
