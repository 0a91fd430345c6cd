"""Routes that say what a request may ask for: its fields, and what each family can do."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, get_args, get_origin

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from pydantic import Field as FieldOf

from safelight.assembly.services import Services
from safelight.catalog.cards import Card
from safelight.errors import RequestError
from safelight.families.family import Family
from safelight.families.features import FEATURE_REQUESTS, Feature
from safelight.families.prompt_lengths import prompt_lengths
from safelight.families.registry import families
from safelight.request.adapters import Control, Lora
from safelight.request.field import Field, fields_of
from safelight.request.prompts.loras import extract_lora_tags
from safelight.request.prompts.tokens import TOKENS_PER_CHUNK, chunks
from safelight.request.samplers import SAMPLERS
from safelight.request.schema import Request
from safelight.server import intake
from safelight.server.problems import documented


class FieldModel(BaseModel):
    """A field of a request.

    ``group``, ``label``, ``help``: for people.
    ``kind``: text, whole, number, switch, choice or list.
    ``choices``: the allowed texts of a choice.
    ``needs``: the field has an effect only if at least one of these is set.
    """

    name: str
    group: str
    label: str
    help: str
    kind: str
    optional: bool
    default: Any
    minimum: float | None
    maximum: float | None
    multiple: int
    choices: list[str]
    needs: list[str]


class FieldsModel(BaseModel):
    """The fields of a request, and those of its LoRAs and ControlNets."""

    request: list[FieldModel]
    lora: list[FieldModel]
    control: list[FieldModel]


class VariantModel(BaseModel):
    """What checkpoints of a variant can do.

    ``features``: the names of what a request may ask for.
    ``refused``: fields of a request that such checkpoints refuse, each with the feature that they lack.
    ``needs``: what a request must have: image, mask or references.
    ``steps``, ``cfg``, ``guidance``: of a request that names none.
    ``most_references``: how many reference images it takes; 0 for none.
    """

    features: list[str]
    refused: dict[str, str]
    needs: list[str]
    steps: int
    cfg: float
    guidance: float | None
    most_references: int


class FamilyAbilities(BaseModel):
    """A family of models.

    ``resolution``: pixels per side of its training images. ``multiple``: that sides must be multiples of.
    ``noise``: ``discrete`` or ``flow``; only flows have a shift.
    ``samplers``: the schedules of each sampler.
    """

    name: str
    resolution: int
    multiple: int
    noise: str
    samplers: dict[str, list[str]]
    control_modes: list[str]
    variants: dict[str, VariantModel]


class SamplerModel(BaseModel):
    """A sampler. ``label``: A1111's name for it."""

    name: str
    label: str


class Families(BaseModel):
    """All families and samplers."""

    families: list[FamilyAbilities]
    samplers: list[SamplerModel]


class TokensAsked(BaseModel):
    """A prompt for a model. ``model``: its name; the server's default model if it is empty."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = FieldOf(max_length=100_000)
    model: str = ""


class EncoderTokens(BaseModel):
    """How long a prompt is for a text encoder.

    ``encoder``: its role, such as text_encoder_2. ``name``: of its tokenizer, such as T5.
    ``tokens``: how many the prompt has; tokens that the family adds do not count.
    ``most``: how many it reads; the rest is cut off. 0 if it reads all.
    ``chunk``: tokens that are encoded together; 0 if all are.
    """

    encoder: str
    name: str
    tokens: int
    most: int
    chunk: int


class TokensModel(BaseModel):
    """How long a prompt is for each text encoder of a model. ``problem``: why it cannot be used; empty if it can."""

    encoders: list[EncoderTokens]
    problem: str


class FieldRoutes:
    """The routes for what a request may ask for."""

    def __init__(self, control: Services) -> None:
        self._control = control

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.get("/fields", tags=["jobs"])(self.fields)
        api.get("/families", tags=["models"])(self.families)
        api.post("/tokens", tags=["jobs"], responses=documented(404, 409))(self.tokens)

    def fields(self) -> FieldsModel:
        """List the fields of a request with their bounds and what they do."""
        return _fields()

    def families(self) -> Families:
        """List the families, and what the checkpoints of each variant can do."""
        return _families()

    def tokens(self, asked: TokensAsked) -> TokensModel:
        """Count the tokens of a prompt."""
        # By the card, because a file that was imported may not have been read yet.
        catalog, default = self._control.catalog, intake.default_card
        card = catalog.model_card(asked.model) if asked.model else default(self._control)
        family = families().get(card.summary["base"])
        if family is None:
            return TokensModel(encoders=[], problem="")
        try:
            text, _ = extract_lora_tags("prompt", asked.prompt)
            if Feature.PROMPT_WEIGHTS not in family.features:
                return TokensModel(encoders=self._whole_texts(family, card, text), problem="")
            found = chunks("prompt", text, NOTHING)
        except RequestError as error:
            return TokensModel(encoders=[], problem=error.problem)
        # Without the tokens that begin and end each chunk.
        count = sum(sum(token != NOTHING for token in one.ids) - 2 for one in found)
        one = EncoderTokens(encoder="text_encoder", name="CLIP", tokens=count, most=0, chunk=TOKENS_PER_CHUNK)
        return TokensModel(encoders=[one], problem="")

    def _whole_texts(self, family: Family, card: Card, text: str) -> list[EncoderTokens]:
        """Count the tokens for text encoders that read a prompt as it is written."""
        model = self._control.library.get(card.name) if card.digest else None
        components = () if model is None else model.manifest.components
        own = {one.role: one.tokenizer.read() for one in components if one.tokenizer is not None}
        return [
            EncoderTokens(encoder=one.role, name=one.name, tokens=one.tokens, most=one.most, chunk=0)
            for one in prompt_lengths(family, card.summary["variant"], own, text)
        ]


NOTHING = -1
"""Fills chunks; no token has this number."""


@lru_cache
def _fields() -> FieldsModel:
    parts = {name: [_field(one) for one in fields_of(kind).values()] for name, kind in _KINDS.items()}
    return FieldsModel(**parts)


_KINDS: Mapping[str, type] = {"request": Request, "lora": Lora, "control": Control}


def _field(field: Field) -> FieldModel:
    declared = field.declared
    return FieldModel(
        name=field.name,
        group=declared.group,
        label=field.label,
        help=declared.help,
        kind=_kind(field),
        optional=field.optional,
        default=list(field.default) if isinstance(field.default, tuple) else None if field.required else field.default,
        minimum=declared.minimum if declared.exclusive_minimum is None else declared.exclusive_minimum,
        maximum=declared.maximum,
        multiple=declared.multiple,
        choices=list(field.allowed),
        needs=list(declared.needs),
    )


def _kind(field: Field) -> str:
    if field.allowed:
        return "choice"
    if get_origin(field.type) is tuple or get_args(field.type):
        return "list"
    return {str: "text", int: "whole", float: "number", bool: "switch"}.get(field.type, "list")


@lru_cache
def _families() -> Families:
    found: list[FamilyAbilities] = []
    for name, family in families().items():
        variants: dict[str, VariantModel] = {}
        for label, variant in family.variants.items():
            features, defaults = family.features_of(label), family.defaults_of(label)
            needs = ["image"] if variant.extra_input_channels == "image" else []
            needs += ["image", "mask"] if variant.extra_input_channels in ("mask", "pixel_mask") else []
            if variant.references is not None and variant.references.least:
                needs.append("references")
            variants[label] = VariantModel(
                features=sorted(feature.name.lower() for feature in features),
                refused={
                    field: str(feature)
                    for feature, (field, _) in FEATURE_REQUESTS.items()
                    if feature not in features and feature is not Feature.TEXT_TO_IMAGE
                },
                needs=needs,
                steps=defaults.steps,
                cfg=defaults.cfg,
                guidance=defaults.guidance,
                most_references=0 if variant.references is None else variant.references.most,
            )
        kind = family.noise.kind
        found.append(
            FamilyAbilities(
                name=name,
                resolution=family.resolution,
                multiple=family.latents.multiple,
                noise=kind,
                samplers={n: list(s) for n, one in SAMPLERS.usable() if (s := one.schedules_for(kind))},
                control_modes=sorted(family.control_modes),
                variants=variants,
            )
        )
    return Families(
        families=found, samplers=[SamplerModel(name=name, label=one.a1111 or name) for name, one in SAMPLERS.usable()]
    )
