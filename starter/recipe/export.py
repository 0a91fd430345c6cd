"""Pack the trained weights: one ``.safetensors`` file a style, fp16, in the original (LDM) names, and its record.

``python -m recipe.export --from DIR`` writes into ``safelight_starter``. Embeddings of tokens that no caption has are
set to zero: an unknown word is then neutral instead of random.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from recipe import data, model
from safelight.catalog import records
from safelight.catalog.composition import PartFinder
from safelight.catalog.describe import Choices, Shelf, read_model
from safelight.catalog.identify import identify

PACKAGE = Path(__file__).parents[1] / "safelight_starter"
MOST_BYTES = 32_000_000
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
TITLES = {"noto": "Noto Emoji", "twemoji": "Twemoji", "fluent": "Fluent Emoji 3D"}
LICENCES = {"noto": "Apache-2.0", "twemoji": "CC-BY-4.0", "fluent": "MIT"}


def neutral(embedding: torch.Tensor) -> torch.Tensor:
    """The token embedding with the rows that were never trained set to zero."""
    captions = [f"{prefix}{name}" for _, name in data.subjects() for prefix in ("", "a ")]
    captions += [f"{style} {caption}" for style in data.STYLES for caption in captions]
    used = model.token_ids([*captions, ""]).unique()
    out = torch.zeros_like(embedding)
    out[used] = embedding[used]
    return out


def ldm(states: dict[str, dict[str, torch.Tensor]], probe: Path) -> dict[str, torch.Tensor]:
    """All components' tensors in LDM's names, fp16. ``probe``: a file in diffusers' names, for the settings."""
    layout = identify(probe).layout
    assert layout is not None
    out: dict[str, torch.Tensor] = {}
    for component in layout.components:
        for row in component.config.rows():
            tensor = states[component.role][row.name]
            if component.role == "text_encoder":
                name = f"text_model.{row.name}"
            else:
                name = row.sources[min(1, len(row.sources) - 1)].name
            if ".mid.attn_1." in name and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
            out[PREFIXES[component.role] + name] = tensor.half().contiguous()
    return out


def pack(style: str, source: Path) -> Path:
    trained = torch.load(source / f"{style}.final.pt", weights_only=True)
    trained["vae"] = torch.load(source / "vae.final.pt", weights_only=True)
    name = "embeddings.token_embedding.weight"
    trained["text_encoder"][name] = neutral(trained["text_encoder"][name])
    probe = source / f"{style}.probe.safetensors"
    save_file({f"{r}.{k}": v.contiguous() for r, state in trained.items() for k, v in state.items()}, probe)
    target = PACKAGE / f"starter-{style}.safetensors"
    metadata = {
        "format": "pt",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.title": f"Safelight starter, {TITLES[style]}",
        "modelspec.resolution": f"{data.SIZE}x{data.SIZE}",
        "modelspec.prediction_type": "epsilon",
        "modelspec.license": LICENCES[style],
    }
    save_file(ldm(trained, probe), target, metadata)
    probe.unlink()
    if target.stat().st_size > MOST_BYTES:
        raise SystemExit(f"{target}: {target.stat().st_size} bytes, over {MOST_BYTES}")
    return target


def record(target: Path) -> None:
    """The record that every library shows: as if the file had been added, with a path relative to the package."""
    shelf = Shelf(target.parent, PartFinder(target.parent))
    described = read_model(shelf, target, target.stem, "starter", Choices())
    values = records.stored_values(described)
    manifest = values["manifest"]
    manifest["files"] = [{"path": target.name}]
    data = records.encoded(values | {"path": target.name, "manifest": manifest})
    target.with_suffix(".json").write_bytes(data)
    print(target.name, target.stat().st_size, described.digest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="source", type=Path, default=Path("build/starter"))
    arguments = parser.parse_args()
    for style in data.STYLES:
        record(pack(style, arguments.source))


if __name__ == "__main__":
    main()
