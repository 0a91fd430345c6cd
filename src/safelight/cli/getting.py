"""``safelight models get``: download models and add them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.cli.common import JsonOption, RootOption, bar, byte_bar, loaded, say_json, table

if TYPE_CHECKING:
    from safelight.catalog.library import Library
    from safelight.downloads.adding import Added
    from safelight.downloads.catalogue import CatalogueFile
    from safelight.downloads.download import DownloadProgress
    from safelight.downloads.remote import Bundle
    from safelight.downloads.sources import SourcePart
    from safelight.settings import Settings

EXAMPLES = (
    "Examples: `safelight models get Tongyi-MAI/Z-Image-Turbo` · `safelight models get "
    "https://civitai.com/models/133005` · `safelight models get hf:OWNER/NAME/model.safetensors@REVISION`"
)


def get(
    context: typer.Context,
    sources: Annotated[
        list[str],
        typer.Argument(
            help="A repository on Hugging Face (OWNER/NAME, OWNER/NAME/FILE), a page of Hugging Face or of Civitai "
            "(civitai:MODEL@VERSION), the https address of a file, or a name of `safelight models catalogue`.",
            show_default=False,
        ),
    ],
    file: Annotated[str, typer.Option(help="One file of a repository.", show_default=False)] = "",
    file_variant: Annotated[
        str, typer.Option(help="The variant of a diffusers folder's files, such as fp16.", show_default=False)
    ] = "",
    revision: Annotated[
        str, typer.Option(help="A branch, a tag or a commit of a repository.", show_default=False)
    ] = "",
    name: Annotated[str | None, typer.Option(help="Its name in the library; the file's name by default.")] = None,
    variant: Annotated[
        str, typer.Option(help="The variant of a model that does not say it, such as turbo.", show_default=False)
    ] = "",
    no_add: Annotated[bool, typer.Option("--no-add", help="Download only; do not add it to the library.")] = False,
    as_json: JsonOption = False,
    root: RootOption = None,
) -> None:
    """Download models, adapters, text encoders and VAEs, and add them to the library.

    A download that was interrupted goes on where it stopped. Sizes and SHA-256 are compared where the source says them.
    Pickles are refused. Tokens come from `hf auth login` (or HF_TOKEN) and from CIVITAI_API_TOKEN.
    """
    from safelight.assembly.library import open_library
    from safelight.downloads import sources as known
    from safelight.downloads.adding import add

    settings = loaded(context, root).settings
    choice = known.RepositoryChoice(file, file_variant, revision)
    parts = [part for source in sources for part in known.read_parts(source, choice)]
    library = open_library(settings)
    paths = _download(parts, library, settings, as_json)
    variant = variant or next((part.variant for part in parts if part.variant), "")
    if no_add:
        for path in paths:
            say_json({"path": str(path)}) if as_json else typer.echo(f"downloaded {path}")
        return
    with byte_bar("reading") as on_bytes:
        results = list(add(paths, library, name, variant, on_bytes))
    for one in results:
        _report(one, as_json)
    if any(one.problem for one in results):
        raise typer.Exit(2)


CATALOGUE_EXAMPLES = (
    "Examples: `safelight models catalogue --memory 8` · `safelight models catalogue --family z-image --files` · "
    "`safelight models get z-image-turbo-8gb`"
)


def catalogue(
    family: Annotated[str, typer.Option(help="Only models of this family, such as z-image.", show_default=False)] = "",
    memory: Annotated[
        float | None, typer.Option(help="Only bundles for at most this memory, in GB.", show_default=False)
    ] = None,
    files: Annotated[bool, typer.Option("--files", help="The single files, not the bundles.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List well-known models that `safelight models get NAME` downloads: bundles of the files that belong together.

    Sizes, licences and digests come from published pages; with --json, each row names its page.
    """
    from dataclasses import asdict

    from safelight.downloads.catalogue import read_catalogue

    found = read_catalogue()
    known = {one.family for one in found.files.values()}
    if family and family not in known:
        raise typer.BadParameter(f"{family!r}: must be one of {', '.join(sorted(known))}", param_hint="--family")
    bundles = found.bundles_for(family, memory)
    rows = [one for one in found.files.values() if family in ("", one.family)]
    if as_json:
        for one in rows if files else bundles:
            say_json(asdict(one))
        return
    if files:
        columns = ("name", "kind", "family", "form", "GB", "licence")
        table(columns, [(r.name, r.kind, r.family, r.form, _gigabytes(r), _licence([r])) for r in rows])
        return
    shown: list[tuple[str, ...]] = []
    for bundle in bundles:
        inner = found.find(bundle.name)
        sizes = [one.gigabytes for one in inner]
        total = f"{sum(size or 0 for size in sizes):.1f}" + ("+" if None in sizes else "")
        shown.append((bundle.name, bundle.title, f"{bundle.memory_gb} GB", total, _licence(inner)))
    table(("name", "what", "for memory of", "GB to download", "licence"), shown)


def _gigabytes(row: CatalogueFile) -> str:
    return "" if row.gigabytes is None else f"{row.gigabytes:.1f}"


def _licence(rows: list[CatalogueFile]) -> str:
    """Return the licences of files, as their pages say them."""
    return ", ".join(dict.fromkeys(f"{row.license or 'not known'}{' (gated)' if row.gated else ''}" for row in rows))


def _download(parts: list[SourcePart], library: Library, settings: Settings, as_json: bool) -> list[Path]:
    """Download what the library lacks, with a progress bar. Return what can be added."""
    from safelight.catalog.file_hashes import FileHashes
    from safelight.downloads.connection import open_client
    from safelight.downloads.download import download
    from safelight.downloads.wanted import Wanted

    folder = settings.download_folder or settings.root / "downloads"
    paths: list[Path] = []
    with open_client(settings.download_hosts) as client:
        wanted = Wanted.of([part.find(client) for part in parts], library, FileHashes(settings.root))
        for name in wanted.present:
            say_json({"name": name, "known": True}) if as_json else typer.echo(f"already there: {name}")
        for bundle in wanted.bundles:
            if not as_json:
                _announce(bundle)
            with bar(bundle.title) as update:
                paths += download(bundle, folder, client, lambda now, update=update: _show(now, update))
    return paths


def _report(one: Added, as_json: bool) -> None:
    if as_json:
        values: dict[str, Any] = {"path": str(one.path), "name": one.name, "kind": one.kind, "known": one.known}
        say_json({**values, **({"error": one.problem} if one.problem else {})})
    elif one.problem:
        typer.echo(f"safelight: downloaded, but not added: {one.problem}", err=True)
    else:
        typer.echo(f"{'already in the library:' if one.known else 'added'} {one.name}: {one.kind}, {one.path}")


def _announce(bundle: Bundle) -> None:
    size = "unknown size" if bundle.nbytes is None else f"{bundle.nbytes / 1e9:,.2f} GB"
    count = f"{len(bundle.files)} files" if len(bundle.files) > 1 else "".join(one.name for one in bundle.files)
    typer.echo(f"{bundle.title}: {count}, {size}")
    for note in bundle.notes:
        typer.echo(f"  {note}")


def _show(now: DownloadProgress, update: Any) -> None:
    total = now.total or now.done
    left = "" if now.seconds_left is None else f", {_clock(now.seconds_left)} left"
    update(now.done, max(total, 1), f"{now.done / 1e6:,.0f} of {total / 1e6:,.0f} MB, {now.rate / 1e6:,.1f} MB/s{left}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
