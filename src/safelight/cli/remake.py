"""``safelight remake``: makes an image again from its own metadata."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.cli import values
from safelight.cli.common import JsonOption, RootOption, loaded, say_json
from safelight.errors import CorruptFileError, InputError, RequestError, SafelightError
from safelight.request.model_defaults import OWN_VAE
from safelight.request.results import Image
from safelight.request.schema import Request
from safelight.request.stored import read_request

if TYPE_CHECKING:
    from safelight.diagnostics.suspect_picture import Reproduction
    from safelight.settings import Settings
    from safelight.workers.local_engine import LocalEngine

EXAMPLES = (
    "Examples: `safelight remake out/starter-noto-0.png` · `safelight remake --as-close-as-possible ~/a1111/00001.png`"
)


CloseOption = Annotated[
    bool,
    typer.Option(
        "--as-close-as-possible",
        help="Make an image with the settings of another program's picture, and say what they do not carry over.",
    ),
]


def remake(
    context: typer.Context,
    path: Annotated[
        Path,
        typer.Argument(
            metavar="IMAGE",
            help="An image of Safelight; with --as-close-as-possible, of any program that `safelight show` reads.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The model's present path, if it moved, or another model.")
    ] = None,
    close: CloseOption = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the new image; by default it is not saved.")] = None,
    as_json: JsonOption = False,
    root: RootOption = None,
) -> None:
    """Make an image again from its own metadata and say whether it is the same. Exit code 1 if it differs."""
    from safelight.assembly.importing import open_engine
    from safelight.pictures import chunks
    from safelight.queue.image_files import save

    if out is not None:
        values.folder(out)
    if close:
        make_close(loaded(context, root).settings, path, model or "", out or Path("out"), as_json)
        return
    metadata, held = chunks.read(path)
    recorded = metadata["run"]
    settings = loaded(context, root).settings
    engine = open_engine(as_recorded(settings, recorded))
    image = next(engine.generate(request_of(path, metadata, model or _model_of(engine, metadata))))
    same = image.pixels_sha256 == metadata["pixels_sha256"]
    # A lossy file never has the exact pixels, so nothing tells whether it was edited.
    lossy = "encoding" in metadata and path.suffix.lower() != ".png"
    untouched = None if lossy else held == metadata["pixels_sha256"]
    saved = save(image, out, values.file_form(settings)) if out is not None else None
    other = _differences(metadata, image)
    other |= {f"numerics.{name}": change for name, change in _numerics(metadata, image).items()}
    if as_json:
        say_json(
            {
                "path": str(path),
                "same": same,
                "file_untouched": untouched,
                "same_model": "model" not in other,
                "pixels_sha256": image.pixels_sha256,
                "recorded_sha256": metadata["pixels_sha256"],
                "changed": other,
                "saved": str(saved) if saved else None,
            }
        )
    else:
        _say(path, image, metadata["pixels_sha256"], untouched, other)
    if not same or untouched is False:
        raise typer.Exit(1)


def make_close(settings: Settings, path: Path, model: str, out: Path, as_json: bool) -> None:
    """Make an image with the settings of any program's picture, and say what could not be carried over.

    ``model``: in place of the picture's; "" for the picture's own.
    """
    from safelight.assembly.importing import open_engine
    from safelight.catalog.file_hashes import FileHashes
    from safelight.catalog.inputs import FORMATS
    from safelight.pictures.opening import opened
    from safelight.pictures.read_generation_data import read
    from safelight.queue.image_files import save
    from safelight.resolve.foreign import carry_over

    with opened(path, (*FORMATS, "AVIF")) as picture:
        data = read(picture)
    if data is None:
        raise InputError(f"{path} says nothing about how it was made")
    engine = open_engine(settings)
    carried = carry_over(data, engine.catalog, FileHashes(settings.root))
    image = next(engine.generate(carried.request(model)))
    saved = save(image, out, values.file_form(settings))
    if as_json:
        say_json({"path": str(saved), "program": data.program, "not_carried_over": list(carried.left_out)})
        return
    typer.echo(f"{saved}: with the settings of {data.program}'s picture")
    for sentence in carried.left_out:
        typer.echo(f"  not carried over: {sentence}")


def as_recorded(settings: Settings, recorded: dict[str, Any]) -> Settings:
    """The settings, with those values that the run settings of an image determine."""
    return settings.model_copy(
        update={
            "device": recorded["device"],
            "threads": recorded["threads"],
            "attention_type": recorded["attention"],
            "attention_types": {},
            "attention_slice_size": recorded.get("attention_slice_size", "auto"),
        }
    )


def request_of(path: Path, metadata: Any, model: str) -> Request:
    """The request in an image's metadata, for ``model``. Raises CorruptFileError if it cannot be read."""
    stored = metadata["request"] | {"model": model, "precision": metadata["run"]["dtype"]}
    # The model may have got a default VAE since.
    stored["vae"] = stored.get("vae") or OWN_VAE
    try:
        return read_request(stored, metadata["version"])
    except RequestError as error:
        problem = f"its request cannot be read: {error}"
        raise CorruptFileError(path, f"{problem}; use the version of Safelight that made the image") from error


def distrusted(context: typer.Context, root: Path | None, path: Path) -> Reproduction:
    """Make a picture again as its metadata records, and collect what differs."""
    from safelight.assembly.importing import open_engine
    from safelight.diagnostics.suspect_picture import Reproduction
    from safelight.pictures import chunks

    metadata, held = chunks.read(path)
    recorded = metadata["run"]
    settings = loaded(context, root).settings
    try:
        engine = open_engine(as_recorded(settings, recorded))
    except InputError:
        # This machine lacks the recorded device or kernel. Use the machine's own ones; the comparison reports them.
        engine = open_engine(settings)
    model = engine.library.find_by_digest(
        metadata["model"]["digest"], metadata["model"].get("prediction_type", ""), metadata["request"]["model"]
    )
    try:
        request = request_of(path, metadata, _model_of(engine, metadata))
        image = next(engine.generate(request))
        again = next(engine.generate(request)).pixels_sha256
    except SafelightError as problem:
        return Reproduction(path, metadata, held, model, problem=problem)
    finally:
        engine.close()
    other = _differences(metadata, image)
    versions = {name: other.pop(name) for name in recorded["versions"] if name in other}
    return Reproduction(path, metadata, held, model, image, None, again, other, versions, _numerics(metadata, image))


def _say(path: Path, image: Image, recorded: str, untouched: bool | None, other: dict[str, str]) -> None:
    if image.pixels_sha256 == recorded and untouched is None:
        typer.echo("the new image is the recorded one, pixel for pixel; a lossy file cannot tell whether it was edited")
    elif image.pixels_sha256 == recorded and untouched:
        typer.echo("the same, pixel for pixel")
    elif image.pixels_sha256 == recorded:
        typer.echo("the new image has the recorded pixels, but this file was edited after it was made")
    else:
        typer.echo(f"not the same: recorded {recorded[:16]}, made again {image.pixels_sha256[:16]}")
        if untouched:
            typer.echo(f"  {_how_far(path, image)}")
        if not other:
            typer.echo("  model, settings, hardware and versions are as recorded; was the metadata edited?")
    for name, change in other.items():
        typer.echo(f"  {name}: {change}")


def _how_far(path: Path, image: Image) -> str:
    import numpy as np
    from PIL import Image as PILImage

    with PILImage.open(path) as opened:
        before = np.asarray(opened.convert("RGB"), dtype=np.int16)
    now = np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3).astype(np.int16)
    if before.shape != now.shape:
        return "the sizes differ"
    apart = np.abs(before - now)
    return f"{(apart > 0).any(2).mean():.1%} of the pixels differ, by at most {apart.max()} of 255"


def _differences(metadata: Any, image: Image) -> dict[str, str]:
    """Those run settings, versions and model that differ from the recorded ones, by name."""
    recorded, now = metadata["run"], image.metadata["run"]
    pairs = {name: (value, now.get(name)) for name, value in recorded.items() if name != "versions"}
    pairs["hardware"] = (recorded.get("hardware", "not recorded"), now["hardware"])
    pairs |= {name: (value, now["versions"].get(name)) for name, value in recorded["versions"].items()}
    packages = image.metadata["extensions"]
    pairs |= {name: (value, packages.get(name)) for name, value in metadata.get("extensions", {}).items()}
    pairs["model"] = (metadata["model"]["digest"][:16], image.model_digest[:16])
    return {name: f"{before}, now {after}" for name, (before, after) in pairs.items() if before != after}


def _numerics(metadata: Any, image: Image) -> dict[str, str]:
    """The rows of the numeric state that differ from the recorded ones, by name."""
    before, now = metadata.get("numerics", {}), image.metadata.get("numerics", {})
    return {
        name: f"{value}, now {now.get(name, 'not there')}" for name, value in before.items() if now.get(name) != value
    }


def _model_of(engine: LocalEngine, metadata: Any) -> str:
    """The name or path of the recorded model. If the name has another content now, any model with the same content
    whose files exist."""
    found = engine.library.find_by_digest(
        metadata["model"]["digest"], metadata["model"].get("prediction_type", ""), metadata["request"]["model"]
    )
    if found is None:
        return metadata["request"]["model"]
    return str(found.path) if found.origin == "path" else found.name
