"""``safelight models get``: download models and add them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.cli.common import JsonOption, RootOption, bar, byte_bar, loaded, say_json

if TYPE_CHECKING:
    from safelight.downloads.adding import Added
    from safelight.downloads.download import DownloadProgress
    from safelight.downloads.remote import Bundle

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
            "(civitai:MODEL@VERSION), or the https address of a file.",
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
    from safelight.downloads.connection import open_client
    from safelight.downloads.download import download

    settings = loaded(context, root).settings
    choice = known.RepositoryChoice(file, file_variant, revision)
    finders = [known.read(source, choice) for source in sources]
    folder = settings.download_folder or settings.root / "downloads"
    paths: list[Path] = []
    with open_client(settings.download_hosts) as client:
        bundles = [find(client) for find in finders]
        for bundle in bundles:
            if not as_json:
                _announce(bundle)
            with bar(bundle.title) as update:
                paths += download(bundle, folder, client, lambda now, update=update: _show(now, update))
    if no_add:
        for path in paths:
            say_json({"path": str(path)}) if as_json else typer.echo(f"downloaded {path}")
        return
    with byte_bar("reading") as on_bytes:
        results = list(add(paths, open_library(settings), name, variant, on_bytes))
    for one in results:
        _report(one, as_json)
    if any(one.problem for one in results):
        raise typer.Exit(2)


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
