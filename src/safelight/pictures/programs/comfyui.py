"""Reads ComfyUI's graph by walking it from the saved picture back to the sampler, the prompts and the model.

The chunk ``prompt`` has the graph in the form of ComfyUI's API: for each node its class and its inputs. An input is a
value, or a link ``[node, output]``. The chunk ``workflow`` has the same graph as it is drawn, and is not read.
Source: ``prompt`` of https://docs.comfy.org/development/core-concepts/workflow.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from safelight.pictures.generation_data import GenerationData, UsedLora, file_stem, real, text, whole

MOST_NODES = 10_000

_NOT_TEXT = frozenset({"model", "clip", "vae", "control_net", "image", "latent_image", "pixels", "samples", "mask"})
"""Inputs of conditioning nodes that lead away from the prompt."""

_TEXTS = ("text", "text_g", "t5xxl", "clip_l", "text_l", "prompt", "positive", "string", "value")
_MODELS = ("ckpt_name", "unet_name", "model_name", "diffusion_name")
_VALUES = ("value", "seed", "noise_seed", "int", "float", "number", "string", "text")
_EMPTY = frozenset({"ConditioningZeroOut"})


def read(texts: Mapping[str, str]) -> GenerationData | None:
    """Read a graph. Returns None if there is none, or none with a sampler."""
    try:
        found: Any = json.loads(texts.get("prompt", ""))
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or len(cast("dict[str, Any]", found)) > MOST_NODES:
        return None
    nodes = {str(name): node for name, node in cast("dict[str, Any]", found).items() if isinstance(node, dict)}
    graph = _Graph(cast("dict[str, dict[str, Any]]", nodes))
    sampler = graph.find_sampler()
    return None if sampler is None else graph.describe(sampler)


@dataclass(frozen=True, slots=True)
class _Graph:
    nodes: Mapping[str, dict[str, Any]]

    def inputs(self, name: str) -> dict[str, Any]:
        found = self.nodes.get(name, {}).get("inputs")
        return cast("dict[str, Any]", found) if isinstance(found, dict) else {}

    def kind(self, name: str) -> str:
        return str(self.nodes.get(name, {}).get("class_type", ""))

    def link(self, value: object) -> str | None:
        """Return the node to which an input is linked, None for a value."""
        if isinstance(value, list):
            parts = cast("list[object]", value)
            if len(parts) == 2 and str(parts[0]) in self.nodes:
                return str(parts[0])
        return None

    def back(self, start: str, only: str = "", without: frozenset[str] = frozenset()) -> Iterator[str]:
        """Yield a node and those that lead to it, the nearest first.

        ``only``: the only input to follow where a node has it; "" to follow all.
        """
        waiting, seen = [start], {start}
        while waiting:
            name = waiting.pop(0)
            yield name
            inputs = self.inputs(name)
            followed = {only: inputs[only]} if only and only in inputs else inputs
            for key, value in followed.items():
                other = self.link(value)
                if other is not None and other not in seen and key not in without:
                    seen.add(other)
                    waiting.append(other)

    def find_sampler(self) -> str | None:
        """Return the sampler whose result was saved; the last one on the way."""
        ends = [name for name in self.nodes if self.kind(name).startswith(("SaveImage", "PreviewImage", "Save"))]
        for end in [*ends, *self.nodes]:
            for name in self.back(end):
                if self._samples(name):
                    return name
        return None

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
            self._prompt(positive),
            self._prompt(negative),
            seed,
            whole(self.value(sampler, "steps")) or whole(self.value(sigmas or "", "steps")),
            real(self.value(guider, "cfg")),
            None if positive is None else self._number_on_the_way(positive, "guidance"),
            shift,
            text(self.value(chosen or sampler, "sampler_name")),
            text(self.value(sigmas or sampler, "scheduler")),
            width,
            height,
            model,
            vae=self._vae(),
            clip_skip=self._clip_skip(positive),
            strength=self._strength(sampler, sigmas),
            loras=loras,
        )

    def _prompt(self, start: str | None) -> str:
        """Return the texts that lead to a conditioning."""
        if start is None:
            return ""
        found: list[str] = []
        for name in self.back(start, without=_NOT_TEXT):
            if self.kind(name) in _EMPTY:
                return ""
            for key in _TEXTS:
                written = self.value(name, key)
                if isinstance(written, str) and written.strip() and written.strip() not in found:
                    found.append(written.strip())
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
                strength = real(self.value(name, "strength_model"))
                loras.append(UsedLora(file_stem(lora), 1.0 if strength is None else strength))
            for value in inputs.values():
                # rgthree's Power Lora Loader has a row for each LoRA.
                row = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
                if row.get("on") and text(row.get("lora")):
                    strength = real(row.get("strength"))
                    loras.append(UsedLora(file_stem(text(row["lora"])), 1.0 if strength is None else strength))
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
