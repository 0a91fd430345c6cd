"""``safelight grid``: one prompt with one or two varied values, on one sheet."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.cli.common import JsonOption, RootOption, bar, loaded, say, say_json
from safelight.cli.options import MODEL_OPTION, Given, refuse_without_effect, takes_request
from safelight.cli.values import default_model, folder, seed_of
from safelight.request.results import Image, Progress

if TYPE_CHECKING:
    from safelight.cli.sheet import GridSheet
    from safelight.request.grid import Axis, Cell
    from safelight.request.schema import Request
    from safelight.settings import Settings
    from safelight.workers.local_engine import LocalEngine

EXAMPLES = (
    'Examples: `safelight grid "red apple" -m starter-noto --x lora=none,ink:0.5,ink:1 --y seed=0..2` · '
    '`safelight grid "red apple" --x model=starter-noto,starter-fluent --y prompt=red,green,blue`'
)

DONE = "grid.json"
"""The file beside the images that says which cell each image belongs to."""


ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help=MODEL_OPTION.format(", unless an axis varies it"), show_default=False),
]


@takes_request(without=("count", "isolate"), model=ModelOption)
def grid(
    context: typer.Context,
    given: Given,
    x: Annotated[
        str,
        typer.Option(
            help="What varies from left to right, NAME=V1,V2,…: model, lora (NAME:STRENGTH, none, a+b), lora-strength, "
            "sampler, schedule, steps, cfg, guidance, shift, seed, strength, clip-skip, prompt (a part of it, and its "
            "replacements). 1..4 and 0..1/0.25 are ranges.",
            show_default=False,
        ),
    ],
    y: Annotated[str | None, typer.Option(help="What varies from top to bottom.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Folder for the images and sheet.png.")] = Path("out/grid"),
    as_json: JsonOption = False,
    root: RootOption = None,
) -> None:
    """Draw a prompt with one or two varied values. Save every image, and all of them on one labelled sheet.

    The command switches models as rarely as possible. After an interruption, the same command continues.
    """
    from safelight.cli.sheet import GridSheet
    from safelight.request.grid import axis, cells
    from safelight.request.prompts import variants

    refuse_without_effect(context)
    folder(out)
    settings = loaded(context, root).settings
    across, down = axis("x", x), axis("y", y) if y is not None else None
    request = _request(given, settings, across, down)
    if not as_json and "seed" not in (across.name, down.name if down else ""):
        typer.echo(f"seed {request.seed}")
    all_cells = [
        replace(cell, request=variants.make_choices(cell.request, settings.root / "wildcards")[0])
        for cell in cells(request, across, down)
    ]
    sheet = GridSheet(request.prompt, (across.name, across.values), None if down is None else (down.name, down.values))
    maker = _draw(settings, all_cells, out, sheet, as_json)
    saved = sheet.save(out)
    if not as_json:
        earlier = f", {maker.kept} of them from an earlier run" if maker.kept else ""
        typer.echo(
            f"{saved}: {len(all_cells)} images{earlier}, {maker.switches} switch{'' if maker.switches == 1 else 'es'}"
        )


def _request(given: Given, settings: Settings, across: Axis, down: Axis | None) -> Request:
    """Return the request that the axes vary. Raises RequestError when both -m and an axis select the model."""
    from safelight.errors import RequestError

    model: str | None = given["model"]
    model_axis = next((axis for axis in (across, down) if axis is not None and axis.name == "model"), None)
    if model is not None and model_axis is not None:
        raise RequestError("model", model, "varies along an axis; remove -m")
    if model_axis is not None:
        model = model_axis.values[0]
    model = model or default_model(settings.default_model, None)
    [request] = given.requests([model], seed_of(given["seed"], settings.default_seed, 1))
    return request


def _draw(settings: Settings, all_cells: list[Cell], out: Path, sheet: GridSheet, as_json: bool) -> _Maker:
    """Make the image of each cell, and add it to the sheet. ``as_json``: also print a line for each."""
    from safelight.assembly.importing import open_engine

    with bar("grid") as update:
        maker = _Maker(open_engine(settings), out, all_cells)
        for number, cell in enumerate(all_cells):

            def report(progress: Progress, number: int = number, cell: Cell = cell) -> None:
                at = progress.step / max(1, progress.steps) if progress.stage == "denoise" else 0
                update(int((number + at) * 100), len(all_cells) * 100, Path(cell.request.model).stem)

            try:
                path, kept = maker.make(cell, report)
            except KeyboardInterrupt:
                say(f"{number} of {len(all_cells)} images are saved; run the same command to continue", err=True)
                raise
            sheet.add(path, cell.column, cell.row)
            if as_json:
                entry = {"column": cell.column, "row": cell.row, "path": str(path), "kept": kept}
                say_json({**entry, "pixels_sha256": maker.pixels[path]})
    return maker


_FIELDS = {"file", "pixels_sha256"}


class _Maker:
    """Makes the images of cells, or finds those of an earlier run.

    ``kept``: the number of images from an earlier run. ``switches``: the number of switches of models or LoRAs.
    """

    def __init__(self, engine: LocalEngine, out: Path, all_cells: list[Cell]) -> None:
        from safelight.resolve.resolve import resolve
        from safelight.weights.digest import hash_texts

        self._engine = engine
        self._out = out
        self._known: dict[str, dict[str, str]] = self._read()
        self.pixels: dict[Path, str] = {}
        self.kept = self.switches = 0
        self._last: object = None
        self._keys: dict[tuple[int, int], str] = {}
        # Check everything before the first image begins.
        for cell in all_cells:
            model = engine.library.find(cell.request.model)
            request = resolve(cell.request, engine.catalog, model=model).request
            content = asdict(replace(request, model=model.digest))
            run = asdict(engine.resources_for(model, request.precision).run_settings)
            self._keys[cell.column, cell.row] = hash_texts(json.dumps([content, run], sort_keys=True, default=str))

    def _read(self) -> dict[str, dict[str, str]]:
        from safelight.errors import FileError
        from safelight.files.folder import read_json

        try:
            entries = read_json(self._out / DONE)
        except (FileError, ValueError):
            return {}
        return {key: value for key, value in entries.items() if isinstance(value, dict) and {*value} == _FIELDS}

    def make(self, cell: Cell, report: Any) -> tuple[Path, bool]:
        """Make the image of a cell if necessary. Returns its file, and whether an earlier run made it."""
        from safelight.files.disk import write_whole
        from safelight.queue.image_files import save

        key = self._keys[cell.column, cell.row]
        earlier = self._find_earlier(key)
        if earlier is not None:
            self.kept += 1
            return earlier, True
        combination = cell.request.model, cell.request.loras
        self.switches += combination != self._last
        self._last = combination
        image: Image = next(self._engine.generate(cell.request, report))
        path = save(image, self._out)
        for warning in image.warnings:
            say(f"safelight: {path.name}: {warning}", err=True)
        self._known[key] = {"file": path.name, "pixels_sha256": image.pixels_sha256}
        write_whole(self._out / DONE, json.dumps(self._known, indent=1).encode())
        self.pixels[path] = image.pixels_sha256
        return path, False

    def _find_earlier(self, key: str) -> Path | None:
        """The file that an earlier run made, if it still has the same pixels."""
        from safelight.errors import FileError
        from safelight.pictures import chunks

        known = self._known.get(key)
        if known is None:
            return None
        path = self._out / known["file"]
        try:
            _, present = chunks.read(path)
        except FileError:
            return None
        self.pixels[path] = present
        return path if present == known["pixels_sha256"] else None
