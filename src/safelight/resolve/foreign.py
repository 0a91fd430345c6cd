"""Turns what a picture of another program says into a request, as close as possible, and says what is left out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from safelight.catalog.cards import Card
from safelight.catalog.catalog import Catalog
from safelight.catalog.file_hashes import FileHashes
from safelight.errors import RequestError
from safelight.families.family import Family
from safelight.families.features import first_missing
from safelight.families.registry import families
from safelight.names import canonical
from safelight.pictures.generation_data import GenerationData, Program, file_stem, real, whole
from safelight.request.adapters import Lora
from safelight.request.bounds import MOST_SEED
from safelight.request.field import fields_of
from safelight.request.foreign_samplers import EVENLY, of_comfy, of_invoke, of_label
from safelight.request.model_defaults import OWN_VAE, fill_in
from safelight.request.prompts.loras import extract_lora_tags
from safelight.request.samplers import SAMPLERS, Schedule
from safelight.request.schema import Request
from safelight.request.values import UPSCALERS
from safelight.weights.adapter_kinds import WEIGHT_ADAPTER_KINDS

COMFY_NAMES: tuple[Program, ...] = ("ComfyUI", "SwarmUI", "Fooocus")

COUNTS_FROM_ZERO: tuple[Program, ...] = ("Safelight", "InvokeAI")
"""Programs whose CLIP skip is the number of skipped layers. For the others it is one more."""

NO_VAE = ("none", "automatic", "default (model)")
"""What programs write if the model's own VAE was used."""

NO_MATTER = ("version", "hash", "ti hashes", "app_version", "generation_mode", "software", "source", "rng")
"""The beginnings of those of a program's other values that change nothing in a picture."""


@dataclass(frozen=True, slots=True)
class Carried:
    """A request's fields, and what of the picture they do not have.

    ``model``: the model's name in the library; "" if the library does not have it.
    ``fields``: of :class:`Request`, without the model.
    ``left_out``: a sentence for each thing that could not be carried over.
    """

    model: str
    fields: dict[str, Any]
    left_out: tuple[str, ...]

    def request(self, model: str = "") -> Request:
        """Return the request. ``model``: in place of the picture's. Raises RequestError if there is none."""
        name = model or self.model
        if not name:
            raise RequestError("model", "", f"{self.left_out[0]}; choose one with --model")
        given: dict[str, Any] = {"prompt": "", **self.fields, "model": name}
        return Request(**given)


def carry_over(data: GenerationData, catalog: Catalog, hashes: FileHashes) -> Carried:
    """Return the request that makes a picture as close as possible to the one that ``data`` describes."""
    return _Carrying(data, catalog, hashes).carried()


class _Carrying:
    def __init__(self, data: GenerationData, catalog: Catalog, hashes: FileHashes) -> None:
        self._data, self._hashes = data, hashes
        self._models = catalog.library.cards()
        self._adapters = catalog.adapters.cards()
        self._left_out: list[str] = []
        self._fields: dict[str, Any] = {}

    def carried(self) -> Carried:
        data = self._data
        card = self._find(self._models, data.model, data.model_hash)
        if card is None:
            self._left_out.append(f"the model {data.model or 'is not named'} is not in the library")
        family = None if card is None else families().get(card.summary["base"])
        self._texts()
        self._numbers(family)
        self._sampling(family)
        self._vae()
        self._loras()
        self._rest()
        if card is not None and family is not None:
            self._drop_what_the_family_lacks(card.name, family, card.summary["variant"])
            own = fill_in(Carried(card.name, self._fields, ()).request(), card.summary["defaults"])
            self._left_out += [f"{name} is not in the file; the model's default {own[name]} counts" for name in own]
        return Carried("" if card is None else card.name, self._fields, tuple(self._left_out))

    def _drop_what_the_family_lacks(self, model: str, family: Family, variant: str) -> None:
        if family.defaults_of(variant).guidance is None and self._fields.pop("guidance", None) is not None:
            self._left_out.append(f"{family.name} has no distilled guidance")
        if family.noise_of(variant).kind != "flow" and self._fields.pop("shift", None) is not None:
            self._left_out.append(f"{family.name} has no shift")
        features = family.features_of(variant)
        while missing := first_missing(Carried(model, self._fields, ()).request(), features):
            field, feature = missing
            if self._fields.pop(field, None) is None:
                # The model makes no images from text alone, for example; making the image says so.
                return
            self._left_out.append(f"{family.name} does not have {feature}")

    def _texts(self) -> None:
        self._fields["prompt"], _ = extract_lora_tags("prompt", self._data.prompt)
        if self._data.negative:
            self._fields["negative"] = self._data.negative
        if self._data.program == "InvokeAI":
            self._fields["prompt_syntax"] = "compel"
        elif self._data.program == "NovelAI" and any(sign in self._data.prompt for sign in "{}[]"):
            self._left_out.append("NovelAI's brackets for weights mean something else here")
        elif self._data.program in COMFY_NAMES and ":" in self._data.prompt and "(" in self._data.prompt:
            self._left_out.append("ComfyUI computes weights in prompts in another way than A1111 and Safelight do")

    def _numbers(self, family: Family | None) -> None:
        data, declared = self._data, fields_of(Request)
        skip = data.clip_skip
        if skip is not None and data.program not in COUNTS_FROM_ZERO:
            skip -= 1
        wanted = {"seed": data.seed, "steps": data.steps, "cfg": data.cfg, "clip_skip": skip or 0}
        wanted |= {"guidance": data.guidance, "shift": data.shift}
        wanted |= self._size(family)
        for name, value in wanted.items():
            if value is None:
                continue
            try:
                declared[name].check(value)
            except RequestError:
                most = f"; the largest seed here is {MOST_SEED}" if name == "seed" else ""
                self._left_out.append(f"{declared[name].label.lower()} {value} is not possible here{most}")
            else:
                self._fields[name] = value

    def _size(self, family: Family | None) -> dict[str, int | None]:
        multiple = family.latents.multiple if family is not None else 8
        sides = {"width": self._data.width, "height": self._data.height}
        for name, side in sides.items():
            if side is not None and side % multiple:
                sides[name] = max(multiple, round(side / multiple) * multiple)
                self._left_out.append(f"{name} {side} becomes {sides[name]}, a multiple of {multiple}")
        return sides

    def _sampling(self, family: Family | None) -> None:
        data = self._data
        if not data.sampler:
            return
        found = _sampler(data.program, data.sampler, data.schedule)
        said = f"{data.sampler} {data.schedule}".strip()
        if found is not None and family is not None:
            able = SAMPLERS[found[0]].schedules_for(family.noise.kind)
            found = found if found[1] in able else (found[0], able[0]) if able else None
        if found is None:
            self._left_out.append(f"the sampler {said} is not among Safelight's for this model")
            return
        self._fields["sampler"], self._fields["schedule"] = found
        if data.schedule.lower() in EVENLY:
            self._left_out.append(f"the schedule {data.schedule} spaces the steps slightly differently from {found[1]}")

    def _vae(self) -> None:
        if not self._data.vae or self._data.vae.lower() in NO_VAE:
            self._fields["vae"] = OWN_VAE
            return
        names = [card for card in self._adapters if card.kind == "vae"]
        card = self._find([*names, *self._models], self._data.vae, "")
        if card is None:
            self._fields["vae"] = OWN_VAE
            self._left_out.append(f"the VAE {self._data.vae} is not in the library; the model's own is used")
        else:
            self._fields["vae"] = card.name

    def _loras(self) -> None:
        cards = [card for card in self._adapters if card.kind in WEIGHT_ADAPTER_KINDS]
        found: list[Lora] = []
        for one in self._data.loras:
            card = self._find(cards, one.name, one.digest)
            if card is None:
                self._left_out.append(f"the LoRA {one.name} ({one.strength:g}) is not in the library")
                continue
            try:
                found.append(Lora(card.name, one.strength))
            except RequestError as error:
                self._left_out.append(f"the LoRA {one.name}: {error}")
        if found:
            self._fields["loras"] = tuple(found)

    def _rest(self) -> None:
        data = self._data
        used = self._hires(data)
        if not used and data.strength is not None and data.strength < 1:
            self._left_out.append(f"strength {data.strength:g}: the input image is not in the file")
        if data.program in ("A1111", "Fooocus") and data.others.get("RNG") != "CPU":
            self._left_out.append(f"{data.program} draws its noise on the GPU, if it is not set otherwise")
        for name, value in data.others.items():
            if name not in used and not name.lower().startswith(NO_MATTER) and not name.lower().endswith("hash"):
                self._left_out.append(f"{name}: {value[:80]}")

    def _hires(self, data: GenerationData) -> tuple[str, ...]:
        """Carry over A1111's hires fix. Returns the names of the values that it used, none without a hires fix."""
        scale = real(data.others.get("Hires upscale"))
        if scale is None or scale <= 1:
            return ()
        label = data.others.get("Hires upscaler", "Latent")
        upscaler = next((own for own, theirs in UPSCALERS.items() if theirs.lower() == label.lower()), None)
        if upscaler is None:
            self._left_out.append(f"the upscaler {label} is not among Safelight's; latent is used")
        self._fields |= {"hires_scale": scale, "hires_upscaler": upscaler or "latent"}
        self._fields |= {"hires_steps": whole(data.others.get("Hires steps")) or 0}
        if data.strength is not None and data.strength > 0:
            self._fields["hires_strength"] = data.strength
        return ("Hires upscale", "Hires upscaler", "Hires steps")

    def _find(self, cards: Iterable[Card], name: str, digits: str) -> Card | None:
        """Return the card of a hash, or else of a name or of a file's name, in which case does not count."""
        listed = list(cards)
        wanted = digits.strip().lower()
        if wanted:
            own = next((card for card in listed if len(wanted) >= 10 and card.digest.startswith(wanted)), None)
            found = own or self._hashes.find(wanted, listed)
            if found is not None:
                return found
        stem = _comparable(file_stem(name))
        if not stem:
            return None
        card = next((card for card in listed if stem in (_comparable(card.name), _comparable(card.stem))), None)
        if card is not None and wanted:
            known = self._hashes.known(card.path)
            todo = "its hash is not known yet (`safelight models hashes`)" if known is None else "it is another file"
            self._left_out.append(f"{card.name} was found by its name, and not by the hash {digits[:16]}: {todo}")
        return card


def _comparable(name: str) -> str:
    """Return a name without what programs change in it: case, and which sign is between its words."""
    return re.sub(r"[\s._-]+", " ", canonical(name).casefold()).strip()


def _sampler(program: Program, sampler: str, schedule: str) -> tuple[str, Schedule] | None:
    if program == "Safelight":
        return of_label(sampler, "" if schedule == "default" else schedule)
    if program == "InvokeAI":
        return of_invoke(sampler)
    if program in COMFY_NAMES:
        return of_comfy(sampler.lower(), schedule.lower())
    if program == "NovelAI":
        return of_comfy(sampler.lower().removeprefix("k_"), schedule.lower().replace("native", ""))
    return of_label(sampler, schedule)
