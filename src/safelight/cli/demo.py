"""``safelight demo``: draws with the starters or the starter adapters, on one sheet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from safelight.cli.common import RootOption
from safelight.cli.generate import local, make
from safelight.request.adapters import Control, Lora
from safelight.request.results import Image
from safelight.request.schema import Request

ADAPTED = "starter-noto"
"""The starter on which the starter adapters were trained."""

EDGES = "edges"
"""The starter ControlNet."""

OTHER = "octopus"
"""The prompt of the picture that the ControlNet draws inside the edges of another one."""


def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for the images and the sheet.")] = Path("out/demo"),
    prompt: Annotated[str, typer.Option(help="What to draw.")] = "red apple",
    adapters: Annotated[
        bool,
        typer.Option(
            "--adapters", help="One starter: without adapters, with each starter adapter, with several, without again."
        ),
    ] = False,
    root: RootOption = None,
) -> None:
    """Draw one prompt with each starter, then with the first again: the last image equals the first."""
    from safelight.catalog import starters
    from safelight.cli.sheet import Sheet
    from safelight.errors import InputError, IntegrityError

    engine = local(context, root)
    # The smallest pictures first: the first starter draws twice.
    names = [model.name for model in sorted(starters.models(), key=lambda model: model.resolution)]
    if len(names) < 2:
        raise InputError("the starters are not installed; `make demo` in a clone installs them")
    sheet, digests = Sheet(prompt), list[str]()

    def draw(request: Request, label: str = "") -> Image:
        [image] = make(engine, [request], out, as_json=False)
        sheet.add(image, label)
        digests.append(image.pixels_sha256)
        return image

    if adapters:
        plain = Request(prompt=prompt, model=ADAPTED)
        first = draw(plain)
        ink, turned = Lora("ink"), Lora("turned")
        for loras in ((ink,), (turned,), (ink, turned)):
            draw(replace(plain, loras=loras), " and ".join(lora.name for lora in loras))
        other = replace(plain, prompt=OTHER)
        draw(other, OTHER)
        edged = replace(other, controls=(Control(EDGES, str(first.path), preprocessor="canny"),))
        draw(edged, f"{OTHER}, {EDGES} of the first")
        draw(replace(edged, loras=(ink,)), "the same, and ink")
        draw(plain)
    else:
        draw(Request(prompt=prompt, model=names[0]))
        for name in names[1:]:
            try:
                draw(Request(prompt=prompt, model=name))
            except InputError as error:
                # Old versions of diffusers and transformers cannot compute each family.
                typer.echo(f"{name} is left out: {error}", err=True)
        draw(Request(prompt=prompt, model=names[0]))
    path = sheet.save(out)
    first_pixels, last = digests[0], digests[-1]
    typer.echo(f"{path}")
    if first_pixels != last:
        problem = f"the last image {last[:16]} differs from the first {first_pixels[:16]}"
        raise IntegrityError(out, "", problem, "Run `safelight doctor` to find the cause.")
    typer.echo(f"identical: the first and the last image are the same, pixel for pixel ({first_pixels})")
