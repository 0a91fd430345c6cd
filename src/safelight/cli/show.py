"""``safelight show``: says how a picture was made, whichever program made it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.cli.common import JsonOption, say_json, table

if TYPE_CHECKING:
    from safelight.pictures.generation_data import GenerationData

EXAMPLES = "Example: `safelight show ~/outputs/00001-1234.png`"

LABELS = {
    "program": "made by",
    "prompt": "prompt",
    "negative": "negative prompt",
    "model": "model",
    "model_hash": "hash of the model",
    "vae": "VAE",
    "seed": "seed",
    "steps": "steps",
    "sampler": "sampler",
    "schedule": "schedule",
    "cfg": "guidance scale (CFG)",
    "guidance": "distilled guidance",
    "shift": "shift",
    "clip_skip": "CLIP skip",
    "strength": "strength",
}


def show(
    path: Annotated[
        Path, typer.Argument(metavar="PICTURE", help="A PNG, JPEG, WebP or AVIF file.", show_default=False)
    ],
    as_json: JsonOption = False,
) -> None:
    """Show how a picture was made, by Safelight or by another program.

    It reads A1111, Forge, ComfyUI, InvokeAI, NovelAI, Fooocus, SwarmUI and Draw Things.
    Exit code 1 if the file says nothing about it.
    """
    from safelight.catalog.inputs import FORMATS
    from safelight.pictures.opening import opened
    from safelight.pictures.read_generation_data import read

    with opened(path, (*FORMATS, "AVIF")) as image:
        found = read(image)
    if found is None:
        typer.echo(f"{path} says nothing about how it was made", err=True)
        raise typer.Exit(1)
    if as_json:
        say_json(asdict(found))
    else:
        table(("", ""), list(_rows(found).items()))


def _rows(found: GenerationData) -> dict[str, str]:
    values: dict[str, Any] = asdict(found)
    rows = {label: str(values[name]) for name, label in LABELS.items() if values[name] not in (None, "")}
    if found.width and found.height:
        rows["size"] = f"{found.width}x{found.height}"
    if found.loras:
        rows["LoRAs"] = ", ".join(f"{one.name} {one.strength:g}" for one in found.loras)
    return rows | dict(found.others)
