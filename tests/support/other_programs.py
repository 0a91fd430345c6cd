"""Lays out folders as five programs do, with tiny models."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from support import adapters

WORDS = ("glow", "neon light")


def inversion(path: Path) -> Path:
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"emb_params": torch.randn(2, 32)}, path)
    return path


def vae_of(checkpoint: Path, path: Path) -> Path:
    """Write the VAE of a checkpoint as a file of its own."""
    prefix = "first_stage_model."
    tensors = {name.removeprefix(prefix): one for name, one in load_file(checkpoint).items() if name.startswith(prefix)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: one.contiguous() for name, one in tensors.items()}, path)
    return path


def put(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(source, target))


def a1111(root: Path, tiny: Path) -> Path:
    put(tiny / "a.safetensors", root / "models/Stable-diffusion/国风v3.safetensors")
    put(tiny / "b.safetensors", root / "models/Stable-diffusion/sub folder/My Style v2.safetensors")
    lora = root / "models/Lora/glow.style.safetensors"
    lora.parent.mkdir(parents=True)
    adapters.write(lora)
    lora.with_name("glow.style.civitai.info").write_text(json.dumps({"trainedWords": [", ".join(WORDS)]}))
    lora.with_name("glow.style.preview.png").write_bytes(b"picture")
    vae_of(tiny / "a.safetensors", root / "models/VAE/nice.vae.safetensors")
    inversion(root / "embeddings/easy.safetensors")
    (root / "venv/lib").mkdir(parents=True)
    put(tiny / "a.safetensors", root / "venv/lib/not a model of the user.safetensors")
    (root / "models/Stable-diffusion/cut off.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    return root


def comfy(root: Path, tiny: Path) -> Path:
    put(tiny / "a.safetensors", root / "models/checkpoints/a.safetensors")
    (root / "models/checkpoints/linked.safetensors").symlink_to(root / "models/checkpoints/a.safetensors")
    (root / "models/checkpoints/put_checkpoints_here").write_text("")
    (root / "custom_nodes").mkdir()
    elsewhere = root.parent / "elsewhere"
    (elsewhere / "loras").mkdir(parents=True)
    adapters.write(elsewhere / "loras/one.safetensors")
    put(tiny / "b.safetensors", elsewhere / "more/a.safetensors")
    (root / "extra_model_paths.yaml").write_text(
        f"a111:\n    base_path: {elsewhere}\n    is_default: true\n    checkpoints: more\n"
        "    loras: |\n        loras\n        absent\n    custom_nodes: loras\n"
    )
    return root


INVOKE_DEFAULTS: dict[str, Any] = {
    "vae": "of the VAE",
    "vae_precision": None,
    "scheduler": "dpmpp_2m_k",
    "steps": 3,
    "cfg_scale": 4.5,
    "cfg_rescale_multiplier": 0.7,
    "width": 72,
    "height": 64,
    "guidance": 3.5,
}
"""Safelight has no ``cfg_rescale_multiplier``, and SD 1 has no distilled guidance."""


def invoke(root: Path, tiny: Path) -> Path:
    put(tiny / "a.safetensors", root / "models/0123/model.safetensors")
    put(tiny / "b.safetensors", root / "models/4567/model.safetensors")
    (root / "models/89ab").mkdir()
    adapters.write(root / "models/89ab/lora.safetensors")
    (root / "models/cdef").mkdir()
    vae_of(tiny / "b.safetensors", root / "models/cdef/vae.safetensors")
    (root / "databases").mkdir()
    with sqlite3.connect(root / "databases/invokeai.db") as database:
        database.execute("CREATE TABLE models (id TEXT NOT NULL PRIMARY KEY, config TEXT NOT NULL)")
        rows: list[dict[str, Any]] = [
            {
                "name": "Dreamy / XL",
                "path": "0123/model.safetensors",
                "type": "main",
                "default_settings": INVOKE_DEFAULTS,
            },
            {"name": "Dreamy / XL", "path": str(root / "models/4567/model.safetensors"), "type": "main"},
            {"name": "Glow", "path": "89ab/lora.safetensors", "type": "lora", "trigger_phrases": list(WORDS)},
            {"name": "Fine VAE", "path": "cdef/vae.safetensors", "type": "vae", "key": "of the VAE"},
            {"name": "gone", "path": "gone/model.safetensors", "type": "main"},
        ]
        database.executemany(
            "INSERT INTO models VALUES (?, ?)", [(row["name"] + row["path"], json.dumps(row)) for row in rows]
        )
    database.close()
    return root


def swarm(root: Path, tiny: Path) -> Path:
    (root / "Data").mkdir(parents=True)
    put(tiny / "a.safetensors", root / "Models/Stable-Diffusion/OfficialSD/a.safetensors")
    lora = root / "Models/Lora/one.safetensors"
    lora.parent.mkdir()
    adapters.write(lora)
    lora.with_name("one.swarm.json").write_text(json.dumps({"modelspec.trigger_phrase": ", ".join(WORDS)}))
    return root


def kohya(root: Path, tiny: Path) -> Path:
    """A folder into which a LoRA was trained, with its states after each epoch."""
    root.mkdir(parents=True)
    for name in ("style-000001", "style-000002", "style"):
        adapters.write(root / f"{name}.safetensors", seed=len(name))
    (root / "style.toml").write_text("")
    return root


PROGRAMS = {"A1111": a1111, "ComfyUI": comfy, "InvokeAI": invoke, "SwarmUI": swarm, "kohya": kohya}
