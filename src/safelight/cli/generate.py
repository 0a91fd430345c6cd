"""``safelight generate``: makes images of a prompt with one or several models."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.cli import values
from safelight.cli.common import JsonOption, RootOption, bar, byte_bar, loaded, say, say_json
from safelight.cli.options import MODEL_OPTION, Given, refuse_without_effect, takes_request, was_given
from safelight.errors import RequestError
from safelight.request.bounds import MOST_PIXELS
from safelight.request.job import Job
from safelight.request.prompts.variants import has_choices
from safelight.request.results import Image, OnProgress, Progress
from safelight.request.schema import Request
from safelight.request.steps import computed_steps

if TYPE_CHECKING:
    from safelight.queue.image_files import FileForm
    from safelight.request.run_settings import RunSettings
    from safelight.settings import Settings
    from safelight.workers.engine import Engine
    from safelight.workers.local_engine import LocalEngine

EXAMPLES = (
    'Examples: `safelight generate "red apple" -m starter-noto` · '
    '`safelight generate "octopus" -m starter-noto -m starter-fluent -m starter-noto --seed 7 --json`'
)
AUTO = "auto"
"""The value of ``--server`` that means the running server, if there is one."""

ModelsOption = Annotated[
    list[str] | None,
    typer.Option("--model", "-m", help=MODEL_OPTION.format("; repeat for several, in order"), show_default=False),
]


def local(context: typer.Context, root: Path | None) -> LocalEngine:
    """Open the engine of this process."""
    from safelight.assembly.importing import open_engine

    return open_engine(loaded(context, root).settings)


def _engine(context: typer.Context, root: Path | None, server: str | None, key: str | None, isolate: bool) -> Engine:
    if server is None and (isolate or loaded(context, root).settings.isolate):
        from safelight.assembly.isolated import open_isolated_runner
        from safelight.catalog.catalog import Catalog
        from safelight.workers.isolation import IsolatedEngine

        settings = loaded(context, root).settings
        return IsolatedEngine(Catalog.under(settings.root), open_isolated_runner(settings))
    if server is None:
        return local(context, root)
    from safelight.workers.client import ServerEngine

    return ServerEngine(server, key)


def _running_server(settings: Settings, key: str | None) -> tuple[str | None, str | None]:
    """Return the address of the server of the same root, None if none runs, and its API key. Say which server it is."""
    from safelight.workers.running_server import find

    url = find(settings.root)
    say(f"safelight: {'no server runs; this process makes the images' if url is None else f'using {url}'}", err=True)
    known = settings.api_key.get_secret_value() if url is not None and settings.api_key is not None else None
    return url, known if key is None else key


def _refuse_without_effect(context: typer.Context) -> None:
    """Raise RequestError for an option on the command line that would have no effect."""
    refuse_without_effect(context)
    given = context.params
    if was_given(context, "api_key") and given["server"] is None:
        raise RequestError("api_key", "…", "has no effect without --server")
    if given["every"] and not any(has_choices(given[text]) for text in ("prompt", "negative")):
        raise RequestError("every", True, "has no effect: the prompt has no choices, {a|b}")
    if given["server"] is not None and context.obj.device is not None:
        raise RequestError("device", context.obj.device, "has no effect with --server; remove --device")


EveryOption = Annotated[
    bool,
    typer.Option(
        "--every", help="With choices in the prompt, {a|b}: make all combinations, not the one that the seed gives."
    ),
]
ImageFormatOption = Annotated[
    str | None, typer.Option(help="png, jpeg or webp; by default the setting image_format.", show_default=False)
]
ImageNamesOption = Annotated[
    str | None, typer.Option(help="Pattern of the files' names, such as {date}/{model}-{seed}.", show_default=False)
]


@takes_request(model=ModelsOption)
def generate(
    context: typer.Context,
    given: Given,
    every: EveryOption = False,
    out: Annotated[
        Path, typer.Option(help="Folder for the images and, with several models, for a sheet of all.")
    ] = Path("out"),
    server: Annotated[
        str | None,
        typer.Option(
            help="Address of a running server that makes the images with its own models. `auto`: the server of the "
            "same root if one runs, else this process."
        ),
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="SAFELIGHT_API_KEY", help="The server's API key.")] = None,
    prove: Annotated[
        bool,
        typer.Option(
            "--prove", help="Make each image twice, isolated and not, and compare them. Exit code 1 if any differs."
        ),
    ] = False,
    image_format: ImageFormatOption = None,
    image_names: ImageNamesOption = None,
    as_json: JsonOption = False,
    root: RootOption = None,
) -> None:
    """Make images with one or several models, one after another, in one process."""
    _refuse_without_effect(context)
    values.folder(out)
    settings = loaded(context, root, image_format=image_format, image_names=image_names).settings
    if server == AUTO:
        server, api_key = _running_server(settings, api_key)
    models: list[str] = given["model"] or [values.default_model(settings.default_model, server)]
    seed = values.seed_of(given["seed"], settings.default_seed, given["count"])
    isolate: bool = given["isolate"]
    requests = given.requests(models, seed, server)
    if prove and (isolate or settings.isolate):
        problem = (
            "makes the isolated images itself; remove --isolate, or the setting (`safelight config unset isolate`)"
        )
        raise RequestError("prove", True, problem)
    requests = _expand(context, root, requests, every)
    from safelight.cli.sheet import Sheet

    sheet = Sheet(given["prompt"])
    isolated = _digests(_engine(context, root, server, api_key, isolate=True), requests) if prove else None
    digests: list[str] = []
    engine, form = _engine(context, root, server, api_key, isolate), values.file_form(settings)
    for image in make(engine, requests, out, as_json, settings.max_pixels, form):
        digests.append(image.pixels_sha256)
        if len(models) > 1:
            sheet.add(image)
    if len(models) > 1:
        path = sheet.save(out)
        if not as_json:
            typer.echo(f"{path}")
    if isolated is not None:
        _compare(isolated, digests, as_json)


def _expand(context: typer.Context, root: Path | None, requests: list[Request], every: bool) -> list[Request]:
    """Replace the choices and wildcards in the prompts. ``every``: return a request for each combination."""
    from safelight.request.prompts import variants

    choose = variants.all_combinations if every else variants.make_choices
    wildcards = loaded(context, root).settings.root / "wildcards"
    return [expanded for request in requests for expanded in choose(request, wildcards)]


def _digests(engine: Engine, requests: list[Request]) -> list[str]:
    """Make the images of all requests in isolation. Returns the hashes of their pixels."""
    isolated = [replace(request, isolate=True) for request in requests]
    return [image.pixels_sha256 for request in isolated for image in engine.generate(request)]


def _compare(isolated: list[str], warm: list[str], as_json: bool) -> None:
    differ = sum(one != other for one, other in zip(isolated, warm, strict=True))
    if as_json:
        say_json({"isolated": isolated, "same": differ == 0})
    elif differ:
        typer.echo(f"NOT the same: {differ} of {len(warm)} images differ from the isolated ones")
    else:
        typer.echo(f"the same: {len(warm)} of {len(warm)} images are equal to the isolated ones")
    if differ:
        raise typer.Exit(1)


def make(
    engine: Engine,
    requests: list[Request],
    out: Path,
    as_json: bool,
    most_pixels: int = MOST_PIXELS,
    form: FileForm | None = None,
) -> Iterator[Image]:
    """Make, save and report the images of all requests. Check every request before the first image begins.

    ``form``: how the files are written; None for PNG.
    """
    from safelight.queue.image_files import FileForm, save

    work, notes = _resolve(engine, requests, most_pixels)
    for note in notes:
        say(f"safelight: {note}", err=True)
    total = sum(computed_steps(request) * request.count for request in requests)
    done = 0
    pace = Pace(total)
    with bar("making") as update:
        for request, one in zip(requests, work, strict=True):

            def report(progress: Progress, request: Request = request, before: int = done) -> None:
                at = before + progress.image * computed_steps(request)
                if progress.stage == "denoise":
                    # Some models compute more steps than the request alone tells.
                    at += progress.step * computed_steps(request) // progress.steps
                update(at, total, f"{Path(request.model).stem}: {progress.stage}")
                if progress.stage == "denoise" and (estimate := pace.at(at)):
                    say(f"safelight: {estimate}", err=True)

            for image in _start(engine, one, report):
                saved = replace(image, path=save(image, out, form or FileForm()))
                if as_json:
                    say_json(_reported(saved))
                for warning in saved.warnings:
                    say(f"safelight: {saved.path}: {warning}", err=True)
                if not as_json:
                    seconds = f"{saved.seconds.total:.2f} s"
                    say(f"{saved.path}  {saved.pixels_sha256[:16]}  {seconds}  seed {saved.seed}{_marks(saved)}")
                yield saved
            done += computed_steps(request) * request.count


def _marks(image: Image) -> str:
    return "  MARKED" if image.metadata.get("marks") else ""


class Pace:
    """After two steps, estimates the remaining time, once, if it is more than a minute.

    total: the number of steps of all images.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._first: tuple[int, float] | None = None
        self._said = False

    def at(self, step: int) -> str:
        """The message at this step, "" for none."""
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
        elif not self._said and step > self._first[0]:
            self._said = True
            seconds = (now - self._first[1]) / (step - self._first[0]) * (self._total - step)
            if seconds > 60:
                return f"about {seconds / 60:.0f} minutes left for {self._total - step} steps"
        return ""


def _resolve(engine: Engine, requests: list[Request], most_pixels: int) -> tuple[list[Job | Request], list[str]]:
    """Resolve all requests, first checking whatever needs no model. Returns the jobs, and notes for the user.

    A server resolves its requests itself; they are returned as they are. Raises the errors of
    :func:`safelight.resolve.resolve.resolve`.
    """
    from safelight.resolve.check import check_texts, find_size_warning
    from safelight.resolve.limits import RequestLimits
    from safelight.resolve.resolve import resolve

    catalog = getattr(engine, "catalog", None)
    if catalog is None:
        return list(requests), []
    for request in requests:
        check_texts(request)
    notes: dict[str, None] = {}
    jobs: list[Job | Request] = []
    for request in requests:
        with byte_bar(f"reading {Path(request.model).name}") as on_bytes:
            model = catalog.library.find(request.model, on_bytes)
        job = resolve(request, catalog, RequestLimits(max_pixels=most_pixels), model=model)
        jobs.append(job)
        notes |= dict.fromkeys(filter(None, [find_size_warning(job.request, model)]))
        decide = getattr(engine, "resources_for", None)
        if decide is not None:
            notes |= dict.fromkeys(filter(None, [_slow(decide(model, request.precision).run_settings)]))
    return jobs, list(notes)


def _start(engine: Engine, work: Job | Request, on_progress: OnProgress) -> Iterator[Image]:
    if isinstance(work, Job):
        run: Any = engine
        return run.run(work, on_progress)
    return engine.generate(work, on_progress)


def _slow(run: RunSettings) -> str:
    from safelight.devices import choice

    return choice.slowness_warning(run.dtype, run.device)


def _reported(image: Image) -> dict[str, Any]:
    seconds = image.seconds
    return {
        "path": str(image.path),
        "model": image.model,
        "model_digest": image.model_digest,
        "seed": image.seed,
        "pixels_sha256": image.pixels_sha256,
        "seconds": {
            "switch": round(seconds.switch, 4),
            "encode": round(seconds.encode, 4),
            "denoise": round(seconds.denoise, 4),
            "decode": round(seconds.decode, 4),
        },
        "memory": {"host_peak_bytes": image.host_peak_bytes},
        "marks": list(image.metadata.get("marks", ())),
    }
