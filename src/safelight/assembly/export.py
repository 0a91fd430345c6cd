"""Writes a model as a diffusers folder for other programs: the same bytes, under the names of diffusers' modules."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from safelight import boundary
from safelight.boundary import exports
from safelight.catalog.model import Model
from safelight.errors import InputError
from safelight.families.family import Family
from safelight.families.family_model import construct, family_model
from safelight.files import safetensors
from safelight.files.disk import flush_to_disk, open_regular, read_exactly, temporary_file_in, write_whole
from safelight.files.header import ITEM_BYTES, TensorInfo
from safelight.pipeline import samplers
from safelight.weights.digest import in_module_order
from safelight.weights.manifest import ComponentManifest, ManifestTensor


def to_diffusers(model: Model, folder: Path) -> None:
    """Write ``model`` into the new folder ``folder``, completely or not at all.

    Raises:
        InputError: ``folder`` exists, or the model cannot be exported.
        CorruptFileError: a file of the model ends too early.
        UnreadableFileError: the folder cannot be written.
    """
    if os.path.lexists(folder):
        raise InputError(f"{folder} already exists; choose another folder with --out")
    known = model.family.variants.get(model.variant)
    problem = model.family.export_problem or ("" if known is None else known.export_problem)
    if problem:
        raise InputError(f"{model.name} ({model.base}) cannot be exported: {problem}")
    compact = next((one for c in model.manifest.components for one in c.tensors if one.is_compact), None)
    if compact is not None:
        problem = f"tensor {compact.name} is {compact.dtype}; quantised models are not written as a folder yet"
        raise InputError(f"{model.name} ({model.base}) cannot be exported: {problem}")
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
    with contextlib.ExitStack() as stack:
        stack.callback(_remove, temporary)
        for component in model.manifest.components:
            _component(model, component, temporary / component.role)
        roles = [component.role for component in model.manifest.components]
        index: dict[str, Any] = {
            "_class_name": model.family.pipeline_class,
            "_diffusers_version": boundary.VERSION,
            **model.family.pipeline_settings(model.variant),
            **dict.fromkeys(model.family.empty_pipeline_components, (None, None)),
            **model.family.variants[model.variant].index,
        }
        for role in roles:
            module = _module(model.family, model.manifest.component(role))
            index[role] = (exports.library_of(module), type(module).__name__)
            own = model.manifest.component(role).tokenizer
            computing = family_model(model.family).with_tokenizer(None if own is None else own.read())
            saved = computing.save_tokenizer(model.family, role, temporary)
            if saved is not None:
                index[saved[0]] = ("transformers", saved[1])
        scheduler = _scheduler(model)
        index["scheduler"] = ("diffusers", type(scheduler).__name__)
        scheduler.save_pretrained(temporary / "scheduler")
        write_whole(temporary / "model_index.json", json.dumps(index, indent=1).encode())
        temporary.rename(folder)


def _scheduler(model: Model) -> Any:
    """Return diffusers' scheduler for Euler's sampler."""
    noise = model.family.noise_of(model.variant)
    # The pipeline computes a shift that depends on the image's size. The scheduler only knows that there is one.
    mu = None if noise.mu is None else 1.0
    scheduler = samplers.make(
        noise, "euler", "default", model.prediction_type, model.zero_terminal_snr, 0, mu=mu
    ).scheduler
    if noise.spacing == "beta":
        # Safelight computes these levels itself. With the setting, diffusers does.
        scheduler.register_to_config(use_beta_sigmas=True)
    return scheduler


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _component(model: Model, component: ComponentManifest, folder: Path) -> None:
    module = _module(model.family, component)
    file_name = "model" if component.role in model.family.text_encoders else "diffusion_pytorch_model"
    by_name = {exports.published_name(module, tensor.name): tensor for tensor in component.tensors}
    with contextlib.ExitStack() as stack:
        opened: dict[Path, int] = {}
        for path in {tensor.path for tensor in component.tensors}:
            opened[path] = open_regular(path)[0]
            stack.callback(os.close, opened[path])
        infos = [
            TensorInfo(exports.published_name(module, t.name), t.dtype, t.shape, t.path, t.offset, t.nbytes)
            for t in component.tensors
        ]
        infos += _unread(component)
        with temporary_file_in(folder) as (file, temporary):
            safetensors.write(
                file,
                infos,
                lambda info: (
                    _bytes(opened[info.path], by_name[info.name]) if info.name in by_name else bytes(info.nbytes)
                ),
            )
            flush_to_disk(file, temporary)
            os.replace(temporary, folder / f"{file_name}.safetensors")
    settings = exports.settings_of(module)
    if component.role == model.family.denoiser:
        settings["sample_size"] = model.resolution // model.family.latents.vae_scale_factor
    write_whole(folder / "config.json", json.dumps(settings).encode())


def _unread(component: ComponentManifest) -> list[TensorInfo]:
    """Return the tensors that other programs expect and nothing reads. They are written as zeros."""
    dtype = component.tensors[-1].dtype
    return [
        TensorInfo(row.name, dtype, row.shape, Path(), 0, math.prod(row.shape) * ITEM_BYTES[dtype])
        for row in component.config.unread_rows()
    ]


def _module(family: Family, component: ComponentManifest) -> Any:
    with torch.device("meta"):
        return construct(family, component.config.published)


def _bytes(descriptor: int, tensor: ManifestTensor) -> bytes:
    data = read_exactly(descriptor, tensor.path, tensor.name, tensor.offset, tensor.nbytes)
    return in_module_order(data, tensor.dtype, tensor.shape, tensor.transpose, tensor.swap_halves)
