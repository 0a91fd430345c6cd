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
from safelight.families.components import Config

PACKAGE = Path(__file__).parents[1] / "safelight_starter"
MOST_BYTES = 32_000_000
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
TITLES = {"noto": "Noto Emoji", "twemoji": "Twemoji", "fluent": "Fluent Emoji 3D"}
LICENCES = {"noto": "Apache-2.0", "twemoji": "CC-BY-4.0", "fluent": "MIT"}


def neutral(embedding: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """The token embedding with the rows that were never trained set to zero. ``used``: ids of the others."""
    out = torch.zeros_like(embedding)
    rows = used.unique()
    out[rows] = embedding[rows]
    return out


def used_tokens() -> torch.Tensor:
    captions = [f"{prefix}{name}" for _, name in data.subjects() for prefix in ("", "a ")]
    captions += [f"{style} {caption}" for style in data.STYLES for caption in captions]
    return model.token_ids([*captions, ""])


def original(config: Config, state: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    """A component's tensors under their original names, fused as the original fuses them.

    ``state``: by the module's names. ``number``: of the original's spelling among a tensor's sources.
    """
    found: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for row in config.rows():
        source, tensor = row.sources[min(number, len(row.sources) - 1)], state[row.name]
        if source.swap_halves:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        if ".mid.attn_1." in source.name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        found.setdefault(source.name, []).append((source.part(len(tensor))[0], tensor))
    parts = {name: [tensor for _, tensor in sorted(some, key=lambda one: one[0])] for name, some in found.items()}
    return {name: torch.cat(some) for name, some in parts.items()}


def ldm(states: dict[str, dict[str, torch.Tensor]], probe: Path) -> dict[str, torch.Tensor]:
    """All components' tensors in LDM's names. ``probe``: a file in diffusers' names, for the settings."""
    layout = identify(probe).layout
    assert layout is not None
    out: dict[str, torch.Tensor] = {}
    for component in layout.components:
        text = component.role == "text_encoder"
        names = original(component.config, states[component.role], 0 if text else 1)
        prefix = PREFIXES[component.role] + ("text_model." if text else "")
        out |= {prefix + name: tensor for name, tensor in names.items()}
    return out


def save(target: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a checkpoint in fp16. Refuses one that is too large."""
    halves = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
    save_file(halves, target, {"format": "pt"} | metadata)
    if target.stat().st_size > MOST_BYTES:
        raise SystemExit(f"{target}: {target.stat().st_size} bytes, over {MOST_BYTES}")


def pack(style: str, source: Path) -> Path:
    trained = torch.load(source / f"{style}.final.pt", weights_only=True)
    trained["vae"] = torch.load(source / "vae.final.pt", weights_only=True)
    name = "embeddings.token_embedding.weight"
    trained["text_encoder"][name] = neutral(trained["text_encoder"][name], used_tokens())
    probe = source / f"{style}.probe.safetensors"
    save_file({f"{r}.{k}": v.contiguous() for r, state in trained.items() for k, v in state.items()}, probe)
    target = PACKAGE / f"starter-{style}.safetensors"
    metadata = {
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.title": f"Safelight starter, {TITLES[style]}",
        "modelspec.resolution": f"{data.SIZE}x{data.SIZE}",
        "modelspec.prediction_type": "epsilon",
        "modelspec.license": LICENCES[style],
    }
    save(target, ldm(trained, probe), metadata)
    probe.unlink()
    return target


def record(target: Path, variant: str = "") -> None:
    """The record that every library shows: as if the file had been added, with a path relative to the package."""
    shelf = Shelf(target.parent, PartFinder(target.parent))
    described = read_model(shelf, target, target.stem, "starter", Choices(variant=variant))
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
