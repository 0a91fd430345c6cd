"""Pack the trained FLUX.1 starter: one ``.safetensors`` file in the original names, fp16, and its record.

``python -m recipe.flux.export --from DIR`` writes into ``safelight_starter``. Embeddings of tokens that no caption has
are set to zero: an unknown word is then neutral instead of random.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from recipe import data
from recipe.export import LICENCES, PACKAGE, neutral, original, record, save
from recipe.flux import model, pictures, train

NAME = "starter-flux"
PREFIXES = {
    "text_encoder": "text_encoders.clip_l.transformer.text_model.",
    "text_encoder_2": "text_encoders.t5xxl.transformer.",
    "transformer": "model.diffusion_model.",
    "vae": "vae.",
}
SPELLINGS = {"text_encoder": 0, "text_encoder_2": 0, "transformer": 1, "vae": 1}
"""Which of a tensor's names in files is the original's."""


def tensors(states: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """All components' tensors in the original names. ``states``: by role, by the modules' names."""
    ids = model.token_ids(train.texts([caption for _, caption in data.subjects()]), max(train.LENGTHS))
    embeddings = {
        "text_encoder": ("embeddings.token_embedding.weight", ids.clip),
        "text_encoder_2": ("shared.weight", ids.t5),
    }
    out: dict[str, torch.Tensor] = {}
    for role, config in model.CONFIGS.items():
        state = dict(states[role])
        if role in embeddings:
            name, used = embeddings[role]
            state[name] = neutral(state[name], used)
        out |= {PREFIXES[role] + name: tensor for name, tensor in original(config, state, SPELLINGS[role]).items()}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="source", type=Path, default=Path("build/starter/flux"))
    source: Path = parser.parse_args().source
    target = PACKAGE / f"{NAME}.safetensors"
    metadata = {
        "modelspec.architecture": "flux-1-dev",
        "modelspec.title": "Safelight starter, FLUX.1 layout",
        "modelspec.resolution": f"{pictures.SIZE}x{pictures.SIZE}",
        "modelspec.license": " AND ".join(sorted(LICENCES.values())),
    }
    save(target, tensors(torch.load(source / "final.pt", weights_only=True)), metadata)
    record(target, "dev")


if __name__ == "__main__":
    main()
