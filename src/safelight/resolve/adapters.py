"""Finds the LoRAs and relatives that a request names, and compares them with its model. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from safelight.catalog.adapters import Adapters
from safelight.catalog.model import Adapter, Model
from safelight.errors import RequestError
from safelight.families.components import Config
from safelight.families.family import CONTROLNET, Family
from safelight.families.registry import family
from safelight.request.adapters import Lora
from safelight.weights.adapter_file import INVERSION, VAE
from safelight.weights.adapter_kinds import WEIGHT_ADAPTER_KINDS
from safelight.weights.adapter_mapping import AdapterConfig, AdapterMatch, Names, Shape, match_adapter, modules_by_name

_HOW_TO_REQUEST = {VAE: "vae", CONTROLNET: "controls (--control)", INVERSION: "a word in the prompt"}

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class ResolvedLora:
    """A LoRA or relative that a request names, and what it changes in the request's model."""

    adapter: Adapter
    lora: Lora
    match: AdapterMatch
    family: Family

    def strength(self, role: str, block: str) -> float:
        """Return the strength on a component, in a block of the denoiser."""
        block_names = self.family.block_names_by_count.get(len(self.lora.blocks), ())
        factors = dict(zip(block_names, self.lora.blocks, strict=True)) if self.lora.blocks else None
        # If there are block weights, a block without one gets strength 0.
        own = self.lora.strength_for(self.family.strength_purpose(role))
        return own * (1.0 if factors is None else factors.get(block, 0.0))

    def scale(self, role: str) -> float | None:
        """Return the LoRA scale from the file's metadata, used if the LoRA has no ``alpha`` tensor.

        None if the metadata has none.
        """
        config = self.adapter.component.config
        assert isinstance(config, AdapterConfig)
        return config.scale(self.family.component(role))


def resolve_lora(lora: Lora, model: Model, adapters: Adapters, by_path: bool, lenient: bool) -> ResolvedLora:
    """Find a LoRA or relative and compare it with the model.

    ``by_path``: the request may name the adapter by its path.
    ``lenient``: leave out tensors that fit nothing in the model.
    Raises RequestError if the adapter does not fit; the error names the tensors. Raises ModelNotFoundError if no
    adapter has the name. Raises IntegrityError if its content changed, or if no adapter has the digest that the request
    gives.
    """
    if lora.digest:
        adapter = adapters.find_by_digest(lora.name, lora.digest, by_path)
    else:
        adapter = adapters.ensure_unchanged(adapters.find(lora.name) if by_path else adapters.get(lora.name))
    if adapter.kind not in WEIGHT_ADAPTER_KINDS:
        way = (
            f"ask for it as {_HOW_TO_REQUEST[adapter.kind]}"
            if adapter.kind in _HOW_TO_REQUEST
            else "no installed package has this kind"
        )
        raise RequestError("loras", lora.name, f"is a {adapter.kind}: {way}")
    # Load the package of the kind now: if that fails, its error is clearer than "no tensor fits".
    _ = WEIGHT_ADAPTER_KINDS[adapter.kind]
    if adapter.base and adapter.base != model.base:
        raise RequestError("loras", lora.name, f"is a {adapter.kind} for {adapter.base}; {model.name} is {model.base}")
    if lora.blocks and len(lora.blocks) not in model.family.block_names_by_count:
        wanted = " or ".join(map(str, sorted(model.family.block_names_by_count))) or "none"
        raise RequestError("loras", lora.name, f"{len(lora.blocks)} block weights; {model.base} has {wanted}")
    shapes = tuple((tensor.name, tensor.shape) for tensor in adapter.component.tensors)
    match = match_cached(shapes, model.base, _configs(model))
    if match.mismatched or not match.count:
        what = (
            "; ".join(match.mismatched[:_SHOWN])
            or f"none of its {len(match.unknown)} tensors belongs to a weight of the model"
        )
        raise RequestError("loras", lora.name, f"does not fit {model.name} ({model.base}): {what}")
    if match.unknown and not lenient:
        some = ", ".join(match.unknown[:_SHOWN]) + (", …" if len(match.unknown) > _SHOWN else "")
        problem = f"{len(match.unknown)} of its tensors fit nothing in {model.name}: {some}"
        raise RequestError("loras", lora.name, f"{problem} (lenient leaves them out)")
    return ResolvedLora(adapter, replace(lora, name=adapter.name, digest=adapter.digest), match, model.family)


def _configs(model: Model) -> tuple[tuple[str, Config], ...]:
    return tuple((component.role, component.config) for component in model.manifest.components)


@lru_cache(maxsize=32)
def match_cached(
    shapes: tuple[tuple[str, Shape], ...], base: str, configs: tuple[tuple[str, Config], ...]
) -> AdapterMatch:
    """Match an adapter's tensors with the modules of a checkpoint; the last results are cached.

    ``shapes``: (name, shape) of each tensor of the adapter.
    ``configs``: (role, settings) of each component of the checkpoint.
    """
    return match_adapter(dict(shapes), _modules_of_checkpoint(base, configs))


@lru_cache(maxsize=16)
def _modules_of_checkpoint(base: str, configs: tuple[tuple[str, Config], ...]) -> Names:
    model_family = family(base)
    return modules_by_name(
        (model_family.component(role), config.rows()) for role, config in configs if role in model_family.roles
    )
