"""``safelight generate``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.cli import values
from safelight.cli.common import JsonOption, RootOption, bar, byte_bar, loaded, say, say_json
from safelight.errors import RequestError
from safelight.prompts.variants import has_choices
from safelight.request.parts import CONTROL_MODES, PREPROCESSORS, RESIZES
from safelight.request.results import Image, Progress
from safelight.request.samplers import SAMPLERS, SCHEDULES, sampler_of
from safelight.request.schema import MOST_PIXELS, UPSCALERS, Request

if TYPE_CHECKING:
    from safelight.engine.base import Engine
    from safelight.engine.local import LocalEngine
    from safelight.request.run_settings import RunSettings

FEWER = tuple(name for name, sampler in SAMPLERS.items() if len(sampler.schedules) < len(SCHEDULES))

EXAMPLES = (
    'Examples: `safelight generate "red apple" -m starter-noto` · '
    '`safelight generate "octopus" -m starter-noto -m starter-fluent -m starter-noto --seed 7 --json`'
)
ModelsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        help="A model's name or path; repeat for several, in order. By default the setting default_model.",
        show_default=False,
    ),
]


def local(context: typer.Context, root: Path | None) -> LocalEngine:
    """The engine of this process."""
    from safelight.assemble.opening import open_engine

    return open_engine(loaded(context, root).settings)


def _engine(context: typer.Context, root: Path | None, server: str | None, key: str | None, isolate: bool) -> Engine:
    if server is None and (isolate or loaded(context, root).settings.isolate):
        from safelight.assemble.control import open_library
        from safelight.assemble.serving import isolating
        from safelight.engine.isolated import IsolatedEngine

        settings = loaded(context, root).settings
        return IsolatedEngine(open_library(settings), isolating(settings))
    if server is None:
        return local(context, root)
    from safelight.engine.client import ServerEngine

    return ServerEngine(server, key)


_NEEDS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("strength", "--image", ("image",)),
    ("mask_blur", "--mask or --outpaint", ("mask", "outpaint")),
    ("variation_seed", "--variation-strength", ("variation_strength",)),
    ("hires_steps", "--hires-scale above 1", ("hires_scale",)),
    ("hires_strength", "--hires-scale above 1", ("hires_scale",)),
    ("hires_upscaler", "--hires-scale above 1", ("hires_scale",)),
    ("api_key", "--server", ("server",)),
)
"""Options that do nothing without one of others: (the option, the others for people, their names)."""


def _refuse_without_effect(context: typer.Context) -> None:
    """Raise RequestError for an option that was given and would do nothing."""
    given = context.params
    for name, of, needed in _NEEDS:
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        if not any(given[other] if other != "hires_scale" else given[other] > 1 for other in needed):
            raise RequestError(name, "…" if name == "api_key" else given[name], f"has no effect without {of}")
    if given["every"] and not any(has_choices(given[text]) for text in ("prompt", "negative")):
        raise RequestError("every", True, "has no effect: the prompt has no choices, {a|b}")
    if given["server"] is not None and context.obj.device is not None:
        raise RequestError("device", context.obj.device, "is the server's: leave --device out beside --server")


def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What to draw.", show_default=False)],
    models: ModelsOption = None,
    negative: Annotated[str, typer.Option(help="What to keep out.")] = "",
    seed: Annotated[str | None, typer.Option(help=values.SEED_HELP, show_default="random")] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 8; the model's own size by default.")] = None,
    height: Annotated[
        int | None, typer.Option(help="Pixels, a multiple of 8; with the width at most 4096 times 4096.")
    ] = None,
    cfg: Annotated[
        float, typer.Option(help="Guidance scale, 0 to 100; up to 1 is none, and the negative prompt has no effect.")
    ] = 7.0,
    sampler: Annotated[
        str, typer.Option(help=f"One of {', '.join(SAMPLERS)}; AUTOMATIC1111's names too: DPM++ 2M Karras.")
    ] = "euler",
    schedule: Annotated[
        str,
        typer.Option(
            help=f"Noise levels: {', '.join(SCHEDULES)}. {', '.join(FEWER)} have only default and sgm_uniform.",
        ),
    ] = "default",
    precision: Annotated[
        str, typer.Option(help="fp32, bf16, fp16 (each gives other pixels); auto: fp32 on a CPU, else what it can.")
    ] = "auto",
    clip_skip: Annotated[
        int, typer.Option(help="Layers of the text encoder to leave out; AUTOMATIC1111 counts one more.")
    ] = 0,
    count: Annotated[int, typer.Option("--count", "-n", help="Images for each model.")] = 1,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="An adapter, NAME or PATH, with its strength: style:0.8; of its own for text and UNet: style:0.5:0.8, "
            "style:te=0:unet=1:lbw=1,0,… Repeat for several; <lora:…> in the prompt does the same.",
            show_default=False,
        ),
    ] = None,
    vae: Annotated[
        str, typer.Option(help="Another VAE than the model's own: the name or path of one, or of a model.")
    ] = "",
    image: Annotated[
        Path | None, typer.Option(help="An image to start from; its size is the default then.", show_default=False)
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="What of that image is drawn anew: white; the rest stays.", show_default=False)
    ] = None,
    strength: Annotated[
        float, typer.Option(help="With an image: the share of the steps that is done; 1 leaves little of it.")
    ] = 0.75,
    mask_blur: Annotated[int, typer.Option(help="Pixels over which the mask's border is softened.")] = 4,
    mask_padding: Annotated[
        int | None,
        typer.Option(help="Draw only the masked part, with so many pixels around it, at the whole size."),
    ] = None,
    outpaint: Annotated[
        str | None,
        typer.Option(help="With an image: pixels by which it is made larger, left,top,right,bottom: 64,0,64,0."),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            help="A ControlNet and its picture, NAME:IMAGE, with more behind: edges:in.png:pre=canny:weight=0.8:"
            f"start=0:end=0.6:mode=more_prompt. pre: {', '.join(PREPROCESSORS)} (thresholds low=, high=). "
            f"resize: {', '.join(RESIZES)}. "
            f"mode: "
            f"{', '.join(CONTROL_MODES)}. Repeat for several.",
            show_default=False,
        ),
    ] = None,
    text_encoder: Annotated[
        str, typer.Option(help="Another model whose text encoders read the prompts: its name or path.")
    ] = "",
    prompt_syntax: Annotated[
        str, typer.Option(help="Whose prompts these are: a1111, or compel (InvokeAI's: word++, (words)1.3, .blend()).")
    ] = "a1111",
    variation_seed: Annotated[int, typer.Option(help="Another seed, whose noise is mixed in.")] = 0,
    variation_strength: Annotated[
        float, typer.Option(help="How much of it, 0 to 1; the next images then have the next variation seeds.")
    ] = 0.0,
    hires_scale: Annotated[
        float, typer.Option(help="High-resolution fix: draw, enlarge by this, and draw again from there; 1: no.")
    ] = 1.0,
    hires_upscaler: Annotated[str, typer.Option(help=f"How it is enlarged: {', '.join(UPSCALERS)}.")] = "latent",
    hires_strength: Annotated[float, typer.Option(help="The share of the steps that is done again.")] = 0.7,
    hires_steps: Annotated[int, typer.Option(help="Of which steps; 0: as many as --steps.")] = 0,
    tile: Annotated[
        int | None,
        typer.Option(help="Pixels a side of the squares by which the VAE works, 0: none; by default for large images."),
    ] = None,
    seamless: Annotated[str, typer.Option(help="Axes along which the image can be repeated: x, y or xy.")] = "",
    every: Annotated[
        bool, typer.Option("--every", help="With choices in the prompt, {a|b}: all combinations, not one by the seed.")
    ] = False,
    lenient: Annotated[
        bool, typer.Option("--lenient", help="Leave out what of an adapter fits nothing in the model.")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for the images; with several models sheet.png too, of the last run.")
    ] = Path("out"),
    server: Annotated[
        str | None, typer.Option(help="Have a running server make them: its address; models are then the server's.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="SAFELIGHT_API_KEY", help="That server's key.")] = None,
    isolate: Annotated[
        bool, typer.Option("--isolate", help="Make each in a process that has never held another model.")
    ] = False,
    prove: Annotated[
        bool,
        typer.Option("--prove", help="Make each both ways, and say whether they are the same; exit code 1 if not."),
    ] = False,
    as_json: JsonOption = False,
    root: RootOption = None,
) -> None:
    """Make images with one or several models, one after another, in one process."""
    _refuse_without_effect(context)
    adapters = tuple(values.lora_of(text) for text in lora or ())
    values.folder(out)
    settings = loaded(context, root).settings
    named = models or [values.default_model(settings.default_model, server)]
    sampler, noise = sampler_of(sampler, schedule)
    first = values.seed_of(seed, settings.default_seed, count)
    requests = [
        Request(
            prompt=prompt,
            model=model,
            negative=negative,
            seed=first,
            steps=steps,
            width=width,
            height=height,
            cfg=cfg,
            sampler=sampler,
            schedule=noise,
            count=count,
            clip_skip=clip_skip,
            precision=precision,  # pyright: ignore[reportArgumentType]
            isolate=isolate,
            loras=adapters,
            lenient=lenient,
            vae=vae,
            image=values.picture("image", image, server),
            mask=values.picture("mask", mask, server),
            strength=strength,
            mask_blur=mask_blur,
            mask_padding=mask_padding,
            outpaint=values.pixels(outpaint),
            controls=tuple(values.control(text, server) for text in control or ()),
            text_encoder=text_encoder,
            prompt_syntax=prompt_syntax,  # pyright: ignore[reportArgumentType]
            variation_seed=variation_seed,
            variation_strength=variation_strength,
            hires_scale=hires_scale,
            hires_upscaler=hires_upscaler,
            hires_strength=hires_strength,
            hires_steps=hires_steps,
            tile=tile,
            seamless=seamless,  # pyright: ignore[reportArgumentType]
        )
        for model in named
    ]
    if prove and (isolate or settings.isolate):
        raise RequestError("prove", True, "compares with isolated images: leave --isolate (or the setting) out")
    requests = _chosen(context, root, requests, every)
    from safelight.cli.sheet import Sheet

    sheet = Sheet(prompt)
    isolated = _digests(_engine(context, root, server, api_key, isolate=True), requests) if prove else None
    digests: list[str] = []
    for made in make(_engine(context, root, server, api_key, isolate), requests, out, as_json, settings.max_pixels):
        digests.append(made.pixels_sha256)
        if len(named) > 1:
            sheet.add(made)
    if len(named) > 1:
        path = sheet.save(out)
        if not as_json:
            typer.echo(f"{path}")
    if isolated is not None:
        _say_whether(isolated, digests, as_json)


def _chosen(context: typer.Context, root: Path | None, requests: list[Request], every: bool) -> list[Request]:
    """The requests, what is to be chosen in their prompts chosen."""
    from safelight.prompts import variants

    choose = variants.every if every else variants.chosen
    wildcards = loaded(context, root).settings.root / "wildcards"
    return [one for request in requests for one in choose(request, wildcards)]


def _digests(engine: Engine, requests: list[Request]) -> list[str]:
    """Of the images of all requests, each made in isolation."""
    alone = [replace(request, isolate=True) for request in requests]
    return [image.pixels_sha256 for request in alone for image in engine.generate(request)]


def _say_whether(isolated: list[str], warm: list[str], as_json: bool) -> None:
    differ = sum(one != other for one, other in zip(isolated, warm, strict=True))
    if as_json:
        say_json({"isolated": isolated, "same": differ == 0})
    elif differ:
        typer.echo(f"NOT the same: {differ} of {len(warm)} images differ from those of processes of their own")
    else:
        typer.echo(f"the same: {len(warm)} of {len(warm)} images are those of processes that held no other model")
    if differ:
        raise typer.Exit(1)


def make(
    engine: Engine, requests: list[Request], out: Path, as_json: bool, most_pixels: int = MOST_PIXELS
) -> Iterator[Image]:
    """Make, save and report the images of all requests; every request is checked before the first image is begun."""
    from safelight.storage.images import save

    for note in _check(engine, requests, most_pixels):
        say(f"safelight: {note}", err=True)
    total = sum(request.steps_done * request.count for request in requests)
    done = 0
    pace = Pace(total)
    with bar("making") as update:
        for request in requests:

            def report(progress: Progress, request: Request = request, before: int = done) -> None:
                at = before + progress.image * request.steps_done
                at += progress.step if progress.stage == "denoise" else 0
                update(at, total, f"{Path(request.model).stem}: {progress.stage}")
                if progress.stage == "denoise" and (said := pace.at(at)):
                    say(f"safelight: {said}", err=True)

            for image in engine.generate(request, report):
                saved = replace(image, path=save(image, out))
                if as_json:
                    say_json(_reported(saved))
                for warning in saved.warnings:
                    say(f"safelight: {saved.path}: {warning}", err=True)
                if not as_json:
                    seconds = f"{saved.seconds.total:.2f} s"
                    say(f"{saved.path}  {saved.pixels_sha256[:16]}  {seconds}  seed {saved.seed}{_marks(saved)}")
                yield saved
            done += request.steps_done * request.count


def _marks(image: Image) -> str:
    return "  MARKED" if image.metadata.get("marks") else ""


class Pace:
    """Says once how long all will take, after two steps, if that is more than a minute. ``total``: steps of all."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._first: tuple[int, float] | None = None
        self._said = False

    def at(self, step: int) -> str:
        """What to say at this step, "" for nothing."""
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
        elif not self._said and step > self._first[0]:
            self._said = True
            seconds = (now - self._first[1]) / (step - self._first[0]) * (self._total - step)
            if seconds > 60:
                return f"about {seconds / 60:.0f} minutes more for {self._total - step} steps"
        return ""


def _check(engine: Engine, requests: list[Request], most_pixels: int) -> list[str]:
    """Raise what is wrong with any of the requests, and give what is to be said of them; a server checks each when it
    is asked. What needs no model is checked before a model is read."""
    from safelight.generate.check import check, check_texts, far_from_trained, within_pixels
    from safelight.library.chosen import Shelves, settled

    library = getattr(engine, "library", None)
    if library is None:
        return []
    notes: dict[str, None] = {}
    for request in requests:
        check_texts(request)
    for request in requests:
        with byte_bar(f"reading {Path(request.model).name}") as on_bytes:
            model = library.resolve(request.model, on_bytes)
        asked = settled(request, model, Shelves.under(library.root))
        within_pixels(asked.request, model, most_pixels)
        check(asked.request, model, asked.words)
        notes |= dict.fromkeys(filter(None, [far_from_trained(asked.request, model)]))
        decide = getattr(engine, "bench_for", None)
        if decide is not None:
            notes |= dict.fromkeys(filter(None, [_slow(decide(model, request.precision).run)]))
    return list(notes)


def _slow(run: RunSettings) -> str:
    from safelight.devices import choice

    return choice.slow(run.dtype, run.device)


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
