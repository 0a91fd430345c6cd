"""``safelight models``: the models in the library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.cli import getting, model_details
from safelight.cli.common import Commands, JsonOption, RootOption, byte_bar, grouped_table, loaded, say_json

if TYPE_CHECKING:
    from safelight.catalog.composition import NamedParts
    from safelight.catalog.found import Found
    from safelight.catalog.library import Library
    from safelight.catalog.model import Model
    from safelight.cli.adding import GivenVariant

app = typer.Typer(
    cls=Commands,
    help="Add models to the library, list, show, verify and remove them.",
    no_args_is_help=True,
    epilog="Example: `safelight models add ~/checkpoints/*.safetensors`",
)


VariantOption = Annotated[
    str,
    typer.Option(help="The variant, where the file does not say it: turbo or base for Z-Image.", show_default=False),
]
VariantsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--variant",
        help="The variant of files that do not say it: turbo, or z-image=turbo for those of one family. Repeat it for"
        " several.",
        show_default=False,
    ),
]
VAEOption = Annotated[
    str, typer.Option("--vae", help="The VAE for a file without one: a name, or a file.", show_default=False)
]
TextEncoderOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A text encoder for a file without one: a name, or a file. Repeat it for several.", show_default=False
    ),
]


def _library(context: typer.Context, root: Path | None) -> Library:
    from safelight.assembly.library import open_library

    return open_library(loaded(context, root).settings)


def _prediction(value: str | None) -> str | None:
    if value not in (None, "epsilon", "v_prediction"):
        raise typer.BadParameter(f"{value!r}: must be epsilon or v_prediction")
    return value


app.command(epilog=getting.EXAMPLES)(getting.get)
app.command(epilog=getting.CATALOGUE_EXAMPLES)(getting.catalogue)
app.command(epilog=model_details.DEFAULTS_EXAMPLES)(model_details.defaults)
app.command(epilog=model_details.HASHES_EXAMPLES)(model_details.hashes)


@app.command(
    epilog="Examples: `safelight models add a.safetensors` · `safelight models add ~/checkpoints` · "
    "`safelight models add v2.ckpt --prediction-type epsilon`"
)
def add(
    context: typer.Context,
    paths: Annotated[
        list[Path],
        typer.Argument(help="Checkpoint files, diffusers folders, or folders of them.", show_default=False),
    ],
    name: Annotated[str | None, typer.Option(help="Its name in the library; the file's name by default.")] = None,
    prediction_type: Annotated[
        str | None, typer.Option(callback=_prediction, help="epsilon or v_prediction, if the file does not say.")
    ] = None,
    variant: VariantsOption = None,
    vae: VAEOption = "",
    text_encoder: TextEncoderOption = None,
    as_json: JsonOption = False,
    root: RootOption = None,
) -> None:
    """Add checkpoints: identify them, read and hash every tensor, and write a manifest. The files stay where they are.

    For a folder, add every checkpoint and adapter in it and in its subfolders (text encoders, VAEs, LoRAs, ControlNets
    and so on), and print a line for each file. A file that lacks its text encoder or VAE takes one that fits from the
    library.
    """
    from safelight.catalog.found import Found, found_in
    from safelight.cli.adding import read_variants, split_adapters
    from safelight.errors import InputError, StorageError

    library = _library(context, root)
    candidates = [candidate for path in paths for candidate in found_in(path)]
    if name is not None and (len(candidates) != 1 or len(paths) > 1):
        raise InputError(f"--name {name!r} needs exactly one path, not {max(len(candidates), len(paths))}")
    failed = False
    parts, variants = _parts(vae, text_encoder), read_variants(variant or ())
    candidates, adapters = split_adapters(candidates)
    for candidate in (*adapters, *candidates):
        try:
            if candidate in adapters:
                result = _add_adapter(library, candidate, as_json)
            else:
                result = _add(library, candidate, name, prediction_type, variants, parts, as_json)
        except StorageError:
            # The disk would also refuse the other files.
            raise
        except InputError as error:
            # A file that is no checkpoint is an error only if the user named the file, not its folder.
            failed = failed or not candidate.within
            if as_json:
                say_json({"path": str(candidate.path), "error": str(error)})
            typer.echo(f"safelight: {error}", err=True)
            continue
        say_json(result) if isinstance(result, dict) else typer.echo(result)
    if not candidates and not adapters:
        given = ", ".join(map(str, paths))
        raise InputError(f"{given}: contains no checkpoint ({', '.join(Found.endings)}, or diffusers folders)")
    if failed:
        raise typer.Exit(2)


def _parts(vae: str, text_encoders: list[str] | None) -> NamedParts:
    from safelight.request.adapters import Purpose

    encoders = [(Purpose.TEXT_ENCODER, name) for name in text_encoders or ()]
    return [*([(Purpose.VAE, vae)] if vae else []), *encoders]


def _add_adapter(library: Library, candidate: Found, as_json: bool) -> str | dict[str, Any]:
    """Add an adapter that is in a folder of models. Returns the report."""
    from safelight.catalog.adapters import Adapters

    adapters = Adapters(library.root)
    known = next((card for card in adapters.cards() if card.path == candidate.path.absolute()), None)
    if known is not None and known.digest and known.state() == "there":
        return dict(known.summary) if as_json else f"{known.name} is already in the library"
    adapter = adapters.add(candidate.path)
    of_family = f" for {adapter.base}" if adapter.base else ""
    return adapter.summary() if as_json else f"added {adapter.name}: {adapter.kind}{of_family}, {adapter.dtype}"


def _add(
    library: Library,
    candidate: Found,
    name: str | None,
    prediction_type: str | None,
    variants: Sequence[GivenVariant],
    parts: NamedParts,
    as_json: bool,
) -> str | dict[str, Any]:
    """Add a checkpoint. Returns the report: a text, or the values for JSON."""
    from safelight.cli.adding import choose_variant

    before = {card.name: card for card in library.cards()}
    known = next((card for card in before.values() if card.path == candidate.path.absolute()), None)
    if candidate.within and known is not None and known.digest and known.state() == "there":
        return dict(known.summary) if as_json else f"{known.name} is already in the library"
    with byte_bar(f"reading {candidate.path.name}") as on_bytes:
        model = library.add(
            candidate.path,
            name,
            prediction_type,  # pyright: ignore[reportArgumentType]
            on_bytes,
            choose_variant(candidate, variants),
            parts,
        )
    if as_json:
        return model.summary()
    size = f"{model.resolution}x{model.resolution}"
    result = _result(model, {card.name: card.digest for card in before.values()})
    return f"{result}: {model.base}, {model.dtype}, {model.prediction_type}, draws {size}{_sources(library, model)}"


def _sources(library: Library, model: Model) -> str:
    """Say which components other files give, and which other files could."""
    lines: list[str] = []
    for role, source in model.sources.items():
        others = [name for name in library.shelf.parts.sources(model, role) if name != source]
        also = f" (these fit, too: {', '.join(others)})" if others else ""
        lines.append(f"\n  {role}: from {source}, {model.manifest.component(role).digest[:10]}{also}")
    return "".join(lines)


def _result(model: Model, before: dict[str, str]) -> str:
    """What adding the model did. It is new, unchanged, a new content of the name, or also known by another name.

    before: the digest of each model in the library, by name.
    """
    if before.get(model.name) == model.digest:
        return f"{model.name} is unchanged"
    if before.get(model.name):
        return f"replaced {model.name} (digest {before[model.name][:10]}, now {model.digest[:10]})"
    same = next((name for name, digest in before.items() if digest == model.digest), None)
    return f"added {model.name}" + (f" (the same content as {same})" if same else "")


@app.command("list", epilog="Example: `safelight models list --json`")
def list_models(context: typer.Context, as_json: JsonOption = False, root: RootOption = None) -> None:
    """List all models, yours and the starters, by family."""
    library = _library(context, root)
    cards = library.cards()
    for error in library.damaged():
        typer.echo(f"safelight: {error}; add the model again or remove it", err=True)
    if as_json:
        for card in cards:
            say_json(card.summary)
        return
    if not cards:
        typer.echo("No models yet. Add one with `safelight models add FILE`.")
        return
    default = loaded(context, root).settings.default_model
    columns = ("name", "for", "dtype", "size", "draws", "digest", "origin", "files")
    groups: dict[str, list[tuple[str, ...]]] = {}
    for card in cards:
        row = _row(card.summary, STATES[card.state()], card.name == default)
        groups.setdefault(card.summary["base"], []).append(row)
    grouped_table(columns, {base: groups[base] for base in sorted(groups)})


def _row(summary: Mapping[str, Any], state: str, default: bool) -> tuple[str, ...]:
    size, side = f"{summary['bytes'] / 1e6:,.0f} MB", summary["resolution"]
    digest = summary["digest"][:10] or "not read yet"
    shown = (summary["variant"], summary["dtype"], size, f"{side}x{side}", digest)
    return (summary["name"] + (" (default)" if default else ""), *shown, summary["origin"], state)


STATES = {"there": "there", "changed": "may have changed; run models verify", "gone": "gone"}
"""The state of a model's files, by their sizes and times alone. Only `verify` reads the files."""


@app.command(epilog="Example: `safelight models show starter-noto`")
def show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A model's name.", show_default=False)],
    as_json: JsonOption = False,
    root: RootOption = None,
) -> None:
    """Show everything that the library knows about a model, and which models share its components."""
    from safelight.catalog.catalog import Catalog

    library = _library(context, root)
    model = library.get(name)
    catalog = Catalog.under(library.root)
    shared = {
        part.role: sorted({card.name for card in catalog.cards_with_component(part.digest)} - {model.name})
        for part in model.manifest.components
    }
    if as_json:
        parts = [
            {"role": part.role, "digest": part.digest, "elements": part.elements, "shared_with": shared[part.role]}
            for part in model.manifest.components
        ]
        say_json({**model.summary(), "components": parts})
        return
    for key, value in model.summary().items():
        typer.echo(f"{key:16} {value}")
    for part in model.manifest.components:
        also = f", also in {', '.join(shared[part.role])}" if shared[part.role] else ""
        typer.echo(f"{part.role:16} {part.elements / 1e6:,.1f} M parameters, digest {part.digest[:16]}{also}")


@app.command(epilog="Examples: `safelight models verify` · `safelight models verify starter-noto`")
def verify(
    context: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(help="Names; all models by default.", show_default=False)] = None,
    as_json: JsonOption = False,
    root: RootOption = None,
) -> None:
    """Read every tensor again and compare it with the manifest. Exit code 1 if anything differs."""
    from safelight.errors import IntegrityError

    library = _library(context, root)
    models: list[Model] = [library.get(name) for name in names] if names else library.models()
    failed = False
    for model in models:
        problem = None
        try:
            with byte_bar(f"verifying {model.name}") as on_bytes:
                library.verify(model.name, on_bytes)
        except IntegrityError as error:
            problem = str(error)
            failed = True
        if as_json:
            say_json(model.summary() | {"intact": problem is None, "problem": problem})
        else:
            typer.echo(f"{model.name}: {'intact' if problem is None else problem}")
    if failed:
        raise typer.Exit(1)


@app.command(epilog="Example: `safelight models export starter-noto --out ~/models/starter-noto`")
def export(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A model's name.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist yet.", show_default=False)],
    form: Annotated[
        str, typer.Option("--format", help="diffusers: a diffusers folder, which other programs read.")
    ] = "diffusers",
    root: RootOption = None,
) -> None:
    """Write a model for other programs: the same weights, byte for byte."""
    if form != "diffusers":
        raise typer.BadParameter(f"{form!r}: must be diffusers", param_hint="--format")
    library = _library(context, root)
    model = library.ensure_unchanged(library.get(name))
    from safelight.assembly.export import to_diffusers

    to_diffusers(model, out.expanduser())
    typer.echo(f"{out}: {name} as a diffusers folder")


@app.command(epilog="Example: `safelight models compact z_image_turbo --form q8_0`")
def compact(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A model's name.", show_default=False)],
    form: Annotated[str, typer.Option(help="q8_0, q5_0 or q4_0 (a GGUF file), or fp8 (a safetensors file).")],
    out: Annotated[
        Path | None,
        typer.Option(help="The file to write; by default NAME-FORM beside the model's file.", show_default=False),
    ] = None,
    new_name: Annotated[str, typer.Option("--name", help="The new model's name; the file's name by default.")] = "",
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Draw a small image with both models, and compare them.")
    ] = True,
    as_json: JsonOption = False,
    root: RootOption = None,
) -> None:
    """Write a model's denoiser quantised, in a file that other programs read, too, and add it to the library.

    Components that the file lacks stay those of the model that it is made from, whose digest ``models show`` says.
    """
    library = _library(context, root)
    model = library.ensure_unchanged(library.get(name))
    from safelight.assembly import compacting
    from safelight.errors import SafelightError
    from safelight.files.blocks import COMPACT_FORMS

    if form not in COMPACT_FORMS:
        raise typer.BadParameter(f"{form!r}: must be one of {', '.join(COMPACT_FORMS)}", param_hint="--form")
    with byte_bar(f"quantising {name}") as on_bytes:
        written, added = compacting.make(library, model, form, out, new_name, on_bytes)
    difference, problem = None, compacting.why_not_measured(model) if measure else ""
    if measure and not problem:
        from safelight.assembly.importing import open_engine

        try:
            difference = compacting.measure(open_engine(loaded(context, root).settings), model, added)
        except SafelightError as error:
            problem = str(error)
    if problem:
        typer.echo(f"its images are not compared: {problem}", err=True)
    if as_json:
        about = {"quantised": written.quantised, "error": written.error, "difference": difference}
        say_json({**added.summary(), "made_from": model.digest, **about})
        return
    typer.echo(f"{written.path}: {written.nbytes / 1e9:.2f} GB, {written.quantised} tensors as {form}")
    typer.echo(f"error of the weights: {100 * written.error:.2f} % (root mean square)")
    if difference is not None:
        typer.echo(f"difference of a small image: {difference}")
    typer.echo(f"added {added.name}: {added.base}, {added.dtype}, made from {model.name}")


@app.command(epilog="Example: `safelight models rollback dream`")
def rollback(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A model's name.", show_default=False)],
    digest: Annotated[
        str, typer.Option(help="The beginning of the digest of an earlier content; the last one by default.")
    ] = "",
    as_json: JsonOption = False,
    root: RootOption = None,
) -> None:
    """Make a name stand for its earlier content again, if the file of that content still exists."""
    library = _library(context, root)
    before = library.get(name)
    with byte_bar(f"reading {name}") as on_bytes:
        model = library.roll_back(name, digest, on_bytes)
    if as_json:
        say_json(model.summary())
    else:
        typer.echo(f"{name} is {model.digest[:10]} again (it was {before.digest[:10]}), from {model.path}")


@app.command("set", epilog="Example: `safelight models set zit --vae ae --variant turbo`")
def set_choices(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A model's name.", show_default=False)],
    variant: VariantOption = "",
    vae: VAEOption = "",
    text_encoder: TextEncoderOption = None,
    as_json: JsonOption = False,
    root: RootOption = None,
) -> None:
    """Change what a model's file does not decide: its variant, and which files give the components that it lacks."""
    from safelight.errors import InputError

    parts = _parts(vae, text_encoder)
    if not parts and not variant:
        raise InputError("name what to change: --variant, --vae or --text-encoder")
    library = _library(context, root)
    with byte_bar(f"reading {name}") as on_bytes:
        model = library.set_choices(name, variant, parts, on_bytes)
    if as_json:
        say_json(model.summary())
    else:
        typer.echo(f"{model.name}: {model.base}, {model.variant}{_sources(library, model)}")


@app.command(epilog="Example: `safelight models remove dream`")
def remove(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A model's name.", show_default=False)],
    as_json: JsonOption = False,
    root: RootOption = None,
) -> None:
    """Remove a model from the library. Its file stays where it is."""
    _library(context, root).remove(name)
    if as_json:
        say_json({"name": name, "removed": True})
    else:
        typer.echo(f"removed {name} from the library; its file stays where it is")


@app.command(epilog="Example: `safelight models rename dream dream-v8`")
def rename(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A model's name.", show_default=False)],
    new: Annotated[str, typer.Argument(help="Its new name.", show_default=False)],
    as_json: JsonOption = False,
    root: RootOption = None,
) -> None:
    """Give a model another name. Its file stays as it is."""
    model = _library(context, root).rename(name, new)
    if as_json:
        say_json(model.summary)
    else:
        typer.echo(f"renamed {name} to {model.name}")
