"""Writes a model as a diffusers folder for other programs: the same bytes, under the names of diffusers' modules."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from safelight.arch import diffusers_fence
from safelight.arch.diffusers_fence import exports, sampling
from safelight.errors import InputError
from safelight.files import open_regular, settle, write_whole, written
from safelight.formats import safetensors
from safelight.formats.header import TensorInfo
from safelight.formats.layout import BASES, LATENT_SCALE
from safelight.generate import samplers
from safelight.library.model import Model
from safelight.prompts.tokens import VOCABULARY
from safelight.weights.digest import read_exactly
from safelight.weights.manifest import ComponentManifest, ManifestTensor

PAD_TOKENS = {0: "!", 49407: "<|endoftext|>"}
"""By CLIP token number: the token with which a tokenizer pads a prompt."""

_WORDS = {"F32": np.dtype("<u4"), "F16": np.dtype("<u2"), "BF16": np.dtype("<u2")}


def to_diffusers(model: Model, folder: Path) -> None:
    """Write ``model`` into the new folder ``folder``, completely or not at all.

    Raises:
        InputError: ``folder`` exists.
        CorruptFileError: a file of the model ends too early.
        UnreadableFileError: the folder cannot be written.
    """
    if os.path.lexists(folder):
        raise InputError(f"{folder} already exists; choose another folder with --out")
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
    with contextlib.ExitStack() as stack:
        stack.callback(_remove, temporary)
        for component in model.manifest.components:
            _write_component(model, component, temporary / component.role)
        roles = [component.role for component in model.manifest.components]
        index: dict[str, Any] = {
            "_class_name": sampling.pipeline_name(model.base),
            "_diffusers_version": diffusers_fence.VERSION,
            **({} if model.base == "sdxl" else dict.fromkeys(("safety_checker", "feature_extractor"), (None, None))),
            "scheduler": ("diffusers", "EulerDiscreteScheduler"),
        }
        for role in roles:
            library = "transformers" if role.startswith("text_encoder") else "diffusers"
            index[role] = (library, exports.class_name(model.base, model.manifest.component(role).config))
            if role.startswith("text_encoder"):
                name = role.replace("text_encoder", "tokenizer")
                pad = PAD_TOKENS[BASES[model.base].pad_ids[role]]
                exports.save_tokenizer(temporary / name, VOCABULARY, pad)
                index[name] = ("transformers", "CLIPTokenizer")
        scheduler = samplers.make("euler", "default", model.prediction_type, model.zero_terminal_snr, 0)
        scheduler.save_pretrained(temporary / "scheduler")
        write_whole(temporary / "model_index.json", json.dumps(index, indent=1).encode())
        temporary.rename(folder)


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _write_component(model: Model, component: ComponentManifest, folder: Path) -> None:
    file_name = "model" if component.role.startswith("text_encoder") else "diffusion_pytorch_model"
    by_name = {_published_name(component.role, tensor.name): tensor for tensor in component.tensors}
    with contextlib.ExitStack() as stack:
        opened: dict[Path, int] = {}
        for path in {tensor.path for tensor in component.tensors}:
            opened[path] = open_regular(path)[0]
            stack.callback(os.close, opened[path])
        infos = [
            TensorInfo(_published_name(component.role, t.name), t.dtype, t.shape, t.path, t.offset, t.nbytes)
            for t in component.tensors
        ]
        with written(folder) as (file, temporary):
            safetensors.write(file, infos, lambda info: _bytes(opened[info.path], by_name[info.name]))
            settle(file, temporary)
            os.replace(temporary, folder / f"{file_name}.safetensors")
    settings = exports.settings_of(model.base, component.config)
    if component.role == "unet":
        settings["sample_size"] = model.resolution // LATENT_SCALE
    write_whole(folder / "config.json", json.dumps(settings).encode())


def _published_name(role: str, name: str) -> str:
    """The name of a tensor as published checkpoints have it.

    Before transformers 5, the modules of a text encoder were inside another module. A program with an older
    transformers ignores unknown names, and would silently draw with random weights.
    """
    inner = role.startswith("text_encoder") and not name.startswith(("text_model.", "text_projection"))
    return f"text_model.{name}" if inner else name


def _bytes(descriptor: int, tensor: ManifestTensor) -> bytes:
    data = read_exactly(descriptor, tensor.path, tensor.name, tensor.offset, tensor.nbytes)
    if not tensor.transpose:
        return data
    return np.frombuffer(data, _WORDS[tensor.dtype]).reshape(tensor.shape[::-1]).T.tobytes()
