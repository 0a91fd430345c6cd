"""Reads ComfyUI's graph by walking it from the saved picture back to the sampler, the prompts and the model.

The chunk ``prompt`` has the graph in the form of ComfyUI's API: for each node its class and its inputs. An input is a
value, or a link ``[node, output]``. The chunk ``workflow`` has the same graph as it is drawn, and is not read.
Source: ``prompt`` of https://docs.comfy.org/development/core-concepts/workflow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from safelight.files.json_values import json_object
from safelight.pictures.generation_data import (
    GenerationData,
    UsedLora,
    file_stem,
    real,
    text,
    used_lora,
    whole,
)

MOST_NODES = 10_000

_NOT_TEXT = frozenset({"model", "clip", "vae", "control_net", "image", "latent_image", "pixels", "samples", "mask"})
"""Inputs of conditioning nodes that lead away from the prompt."""

_TEXTS = ("text", "text_g", "t5xxl", "clip_l", "text_l", "prompt", "string", "value")
_OTHER_SIDE = {"positive": "negative", "negative": "positive"}
_MODELS = ("ckpt_name", "unet_name", "model_name", "diffusion_name")
_VALUES = ("value", "seed", "noise_seed", "int", "float", "number", "string", "text")
_EMPTY = frozenset({"ConditioningZeroOut"})


def read(texts: Mapping[str, str]) -> GenerationData | None:
    """Read a graph. Returns None if there is none, or none with a sampler."""
    found = json_object(texts.get("prompt"))
    if not found or len(found) > MOST_NODES:
        return None
    graph = _Graph({name: json_object(node) for name, node in found.items() if isinstance(node, dict)})
    sampler = graph.find_sampler()
    return None if sampler is None else graph.describe(sampler)


@dataclass(frozen=True, slots=True)
class _Graph:
    nodes: Mapping[str, dict[str, Any]]

    def inputs(self, name: str) -> dict[str, Any]:
        found = self.nodes.get(name, {}).get("inputs")
        return json_object(found) if isinstance(found, dict) else {}

    def kind(self, name: str) -> str:
        return str(self.nodes.get(name, {}).get("class_type", ""))

    def link(self, value: object) -> str | None:
        """Return the node to which an input is linked, None for a value."""
        if isinstance(value, list):
            parts = cast("list[object]", value)
            if len(parts) == 2 and str(parts[0]) in self.nodes:
                return str(parts[0])
        return None

    def back(
        self, start: str, only: str = "", without: frozenset[str] = frozenset(), seen: set[str] | None = None
    ) -> Iterator[str]:
        """Yield a node and those that lead to it, the nearest first.

        ``only``: the only input to follow where a node has it; "" to follow all.
        ``seen``: nodes to skip. Each visited node is added.
        """
        seen = set() if seen is None else seen
        waiting = deque([start])
        while waiting:
            name = waiting.popleft()
            if name in seen:
                continue
            seen.add(name)
            yield name
            inputs = self.inputs(name)
            followed = {only: inputs[only]} if only and only in inputs else inputs
            for key, value in followed.items():
                other = self.link(value)
                if other is not None and key not in without:
                    waiting.append(other)

    def find_sampler(self) -> str | None:
        """Return the sampler whose result was saved; the last one on the way."""
        seen: set[str] = set()
        for end in sorted(self.nodes, key=lambda name: self._rank(self.kind(name))):
            for name in self.back(end, seen=seen):
                if self._samples(name):
                    return name
        return None

    @staticmethod
    def _rank(kind: str) -> int:
        """Return 0 for the node that saves pictures, and more for what says less about the saved picture."""
        ends = ("SaveImage", "Save", "PreviewImage", "")
        return next(number for number, start in enumerate(ends) if kind.startswith(start))

    def _samples(self, name: str) -> bool:
        keys = self.inputs(name).keys()
        return {"positive", "latent_image"} <= keys or {"guider", "sigmas"} <= keys

    def value(self, name: str, key: str) -> object:
        """Return an input's value, also where another node gives it."""
        found = self.inputs(name).get(key)
        for _ in range(20):
            other = self.link(found)
            if other is None:
                return found
            inputs = self.inputs(other)
            found = next((inputs[one] for one in (key, *_VALUES) if one in inputs), None)
        return None

    def describe(self, sampler: str) -> GenerationData:
        """Return what the nodes around a sampler say."""
        inputs = self.inputs(sampler)
        guider = self.link(inputs.get("guider")) or sampler
        sigmas, noise = self.link(inputs.get("sigmas")), self.link(inputs.get("noise"))
        chosen = self.link(inputs.get("sampler"))
        positive = self.link(self.inputs(guider).get("positive", self.inputs(guider).get("conditioning")))
        negative = self.link(self.inputs(guider).get("negative"))
        seed = next(
            (
                number
                for place, key in ((sampler, "seed"), (sampler, "noise_seed"), (noise or "", "noise_seed"))
                if (number := whole(self.value(place, key))) is not None
            ),
            None,
        )
        width, height = self._size(self.link(inputs.get("latent_image")))
        model, loras, shift = self._model(guider)
        return GenerationData(
            "ComfyUI",
            prompt=self._prompt(positive, "positive"),
            negative=self._prompt(negative, "negative"),
            seed=seed,
            steps=whole(self.value(sampler, "steps")) or whole(self.value(sigmas or "", "steps")),
            cfg=real(self.value(guider, "cfg")),
            guidance=None if positive is None else self._number_on_the_way(positive, "guidance"),
            shift=shift,
            sampler=text(self.value(chosen or sampler, "sampler_name")),
            schedule=text(self.value(sigmas or sampler, "scheduler")),
            width=width,
            height=height,
            model=model,
            vae=self._vae(),
            clip_skip=self._clip_skip(positive),
            strength=self._strength(sampler, sigmas),
            loras=loras,
        )

    def _prompt(self, start: str | None, side: str) -> str:
        """Return the texts that lead to a conditioning.

        ``side``: ``positive`` or ``negative``. A node may take and give both; then only this side's input counts.
        """
        if start is None:
            return ""
        found: list[str] = []
        keys = (*_TEXTS, side)
        # What sets a conditioning to zero takes no text from before it.
        seen = {name for name in self.nodes if self.kind(name) in _EMPTY}
        for name in self.back(start, without=_NOT_TEXT | {_OTHER_SIDE[side]}, seen=seen):
            for key in keys:
                written = text(self.value(name, key))
                if written and written not in found:
                    found.append(written)
                    break
        return "\n".join(found)

    def _number_on_the_way(self, start: str, key: str) -> float | None:
        numbers = (real(self.value(name, key)) for name in self.back(start, without=_NOT_TEXT))
        return next((number for number in numbers if number is not None), None)

    def _model(self, start: str) -> tuple[str, tuple[UsedLora, ...], float | None]:
        """Return the model's name, its LoRAs in the order in which they are applied, and the shift of its noise."""
        model, loras, shift = "", list[UsedLora](), None
        for name in self.back(start, only="model"):
            inputs = self.inputs(name)
            lora = text(self.value(name, "lora_name"))
            if lora:
                loras.append(used_lora(file_stem(lora), self.value(name, "strength_model")))
            for value in inputs.values():
                # rgthree's Power Lora Loader has a row for each LoRA.
                row = json_object(value) if isinstance(value, dict) else {}
                if row.get("on") and text(row.get("lora")):
                    loras.append(used_lora(file_stem(text(row["lora"])), row.get("strength")))
            shift = real(self.value(name, "shift")) if shift is None and "shift" in inputs else shift
            model = model or next((text(self.value(name, key)) for key in _MODELS if key in inputs), "")
        return file_stem(model), tuple(reversed(loras)), shift

    def _size(self, latents: str | None) -> tuple[int | None, int | None]:
        for name in self.back(latents) if latents else ():
            width, height = whole(self.value(name, "width")), whole(self.value(name, "height"))
            if width and height:
                return width, height
        return None, None

    def _vae(self) -> str:
        for name in self.nodes:
            if self.kind(name).startswith("VAEDecode"):
                loader = self.link(self.inputs(name).get("vae"))
                if loader is not None and "vae_name" in self.inputs(loader):
                    return file_stem(text(self.value(loader, "vae_name")))
        return ""

    def _clip_skip(self, positive: str | None) -> int | None:
        for name in self.back(positive) if positive else ():
            layer = whole(self.value(name, "stop_at_clip_layer"))
            if layer is not None:
                return -layer
        return None

    def _strength(self, sampler: str, sigmas: str | None) -> float | None:
        found = real(self.value(sampler, "denoise")) or real(self.value(sigmas or "", "denoise"))
        # ComfyUI always writes it, also where there is no input image.
        return None if found == 1 else found
