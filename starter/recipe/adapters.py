"""Train the starter adapters: a LoRA for each of two looks, over a starter's UNet, which stays as it is.

``python -m recipe.adapters`` trains both and writes them into the package, fp16, in PEFT's names. Some six minutes each
on two cores; continues where it was stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from recipe import data, model
from recipe.export import PACKAGE
from recipe.train import Stage, train_unet
from safelight.catalog import records, starters
from safelight.catalog.adapters import Adapters
from safelight.weights.manifest import ComponentManifest

LOOKS = ("ink", "turned")
RANK = 8
BASE = "starter-noto"

INK = (18, 44, 120)
"""What black becomes in the look ``ink``; white stays white."""

LAYERS = [
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "net.0.proj", "net.2"),
    *("conv1", "conv2", "conv_shortcut", "conv_in", "conv_out"),
]


def looks(images: torch.Tensor, look: str) -> torch.Tensor:
    """The images (n, 3, h, w), -1 to 1, in that look: ``ink`` is one blue on white, in ``turned`` each colour is the
    next: red green, green blue, blue red."""
    if look == "turned":
        return images[:, [2, 0, 1]]
    grey = (images * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True) / 2 + 0.5
    ink = torch.tensor(INK).view(1, 3, 1, 1) / 127.5 - 1
    return torch.lerp(ink.expand(len(images), 3, 1, 1), torch.ones(1, 3, 1, 1), grey)


def weights(component: ComponentManifest) -> dict[str, torch.Tensor]:
    """A starter's weights, fp32, by the module's names."""
    out: dict[str, torch.Tensor] = {}
    for tensor in component.tensors:
        with open(tensor.path, "rb") as file:
            file.seek(tensor.offset)
            raw = torch.frombuffer(bytearray(file.read(tensor.nbytes)), dtype=torch.float16)
        out[tensor.name] = raw.view(tensor.shape).float()
    return out


def frozen() -> dict[str, Any]:
    """The parts of the starter over which is trained, as they are."""
    starter = next(found for found in starters.models() if found.name == BASE)
    parts: dict[str, Any] = {
        "unet": model.unet(),
        "text_encoder": model.text_encoder(),
        "vae": model.vae(),
    }
    for role, module in parts.items():
        module.load_state_dict(weights(starter.manifest.component(role)))
        module.eval().requires_grad_(False)
    return parts


def pictures(images: data.Images) -> torch.Tensor:
    """Those of that starter's style (n, 3, h, w), -1 to 1."""
    return data.as_float(images.pixels)[data.STYLES.index(BASE.removeprefix("starter-"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, default=Path("build/packages"))
    parser.add_argument("--out", type=Path, default=Path("build/starter"))
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    parts = frozen()
    images = data.load(arguments.packages)
    pixels = pictures(images)
    captions = torch.stack([model.token_ids(images.subjects), model.token_ids([f"a {s}" for s in images.subjects])])
    for look in LOOKS:
        shown = looks(pixels, look)
        with torch.no_grad():
            latents = parts["vae"].encode(shown).latent_dist.mean * model.SCALING_FACTOR
        torch.manual_seed(0)
        unet = model.unet()
        unet.load_state_dict(parts["unet"].state_dict())
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS))
        trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        stage = Stage(arguments.out / f"{look}.pt", trained, arguments.steps, rate=1e-3, decay=0.99)
        train_unet(stage, unet, parts["text_encoder"], latents, captions)
        # The moving average is in the parameters now.
        state = {f"unet.{k}": v.half().contiguous() for k, v in get_peft_model_state_dict(unet).items()}
        pack(look, state, "lora")


def pack(look: str, state: dict[str, torch.Tensor], kind: str) -> None:
    """Write the adapter and its record into the package. ``kind``: as modelspec names it."""
    target = PACKAGE / "adapters" / f"{look}.safetensors"
    target.parent.mkdir(exist_ok=True)
    metadata = {
        "modelspec.architecture": f"stable-diffusion-v1/{kind}",
        "modelspec.title": f"Safelight starter adapter, {look}",
        "modelspec.license": "Apache-2.0",
    }
    save_file(state, target, metadata)
    described = Adapters(PACKAGE)._describe(target, look, "starter")
    values = records.stored_values(described)
    manifest = values["manifest"]
    manifest["files"] = [{"path": target.name}]
    target.with_suffix(".json").write_bytes(records.encoded(values | {"path": target.name, "manifest": manifest}))
    print(target.name, target.stat().st_size, described.digest, flush=True)


if __name__ == "__main__":
    main()
