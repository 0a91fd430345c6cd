"""``safelight doctor``: looks for what spoils images on this machine, and shows the evidence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safelight.cli.common import JsonOption, RootOption, bar, loaded, say_json
from safelight.errors import InputError

if TYPE_CHECKING:
    from safelight.catalog.model import Model
    from safelight.diagnostics.doctor import Doctor
    from safelight.diagnostics.finding import Finding
    from safelight.diagnostics.report import Report

EXAMPLES = (
    "Examples: `safelight doctor` · `safelight doctor my-model --json` · `safelight doctor --soak 2000` · "
    "`safelight doctor --save report.json` · `safelight doctor --image out/starter-noto-0.png`"
)

TITLES = {
    "loading": "Loading: are the files the same as when they were added?",
    "state": "State: is anything left of the last model?",
    "attention": "Attention: does it compute correctly on this machine?",
    "memory": "Memory: does it contain the bytes that were read?",
    "device": "Device: does it compute correctly and repeatably?",
}


def _soak_of(value: str | None) -> tuple[int, float] | None:
    """Parse the length of a soak. Returns (images, seconds); one of them is 0."""
    if value is None:
        return None
    found = re.fullmatch(r"([0-9]+)(s|m|h)?", value)
    if found is None or not int(found[1]):
        raise InputError(f"--soak {value}: must be a number of images, or a time such as 30m")
    number, unit = int(found[1]), found[2]
    return (number, 0.0) if unit is None else (0, number * {"s": 1.0, "m": 60.0, "h": 3600.0}[unit])


def doctor(
    context: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(help="Models; all by default.", show_default=False)] = None,
    soak: Annotated[
        str | None, typer.Option(help="First switch models at random, for a number of images or a time (30m).")
    ] = None,
    plot: Annotated[Path, typer.Option(help="The file for a soak's diagram of memory and switch times.")] = Path(
        "out/soak.png"
    ),
    since_upgrade: Annotated[
        bool, typer.Option("--since-upgrade", help="Compare the models' canaries with those of earlier versions.")
    ] = False,
    image: Annotated[
        Path | None,
        typer.Option(help="An image that you distrust: say whether it changed, and what is most likely wrong."),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the report to a file, for a bug report.")] = None,
    with_names: Annotated[
        bool, typer.Option("--with-names", help="Include the models' names and paths in that file.")
    ] = False,
    as_json: JsonOption = False,
    root: RootOption = None,
) -> None:
    """Look for what spoils images here: loading, state, attention, memory, device. Exit code 1 if anything is wrong."""
    wanted = _soak_of(soak)
    settings = loaded(context, root).settings
    from safelight.assembly import doctor as examining
    from safelight.diagnostics.report import Report, in_order, without_names

    if image is not None:
        if names or soak or since_upgrade:
            raise InputError("--image: examines one image only; remove the models, --soak and --since-upgrade")
        _picture(context, root, image, save, as_json)
        return
    with examining.doctor(settings) as found:
        library = found.engine.library
        models = [library.get(name) for name in names] if names else library.models()
        if since_upgrade:
            report = Report(tuple(found.since_upgrade(models)), found.machine())
            if not as_json:
                say_all(report)
        else:
            soaked = _soaked(found, models, wanted, plot) if wanted is not None else []
            with bar("examining") as update:
                report = found.examine(models, lambda finding: update(0, 0, finding.what))
            report = Report(in_order((*report.findings, *soaked)), report.machine)
            if not as_json:
                say_all(report)
    if as_json:
        say_json(report.values())
    if save is not None:
        saved = report if with_names else without_names(report, models)
        save.parent.mkdir(parents=True, exist_ok=True)
        save.write_text(json.dumps(saved.values(), indent=1) + "\n")
        if not as_json:
            typer.echo(f"\n{save}: {'with' if with_names else 'without'} the models' names and paths")
    if not report.ok:
        raise typer.Exit(1)


def _picture(context: typer.Context, root: Path | None, image: Path, save: Path | None, as_json: bool) -> None:
    from safelight.cli.remake import distrusted
    from safelight.devices import machine
    from safelight.diagnostics.report import Report
    from safelight.diagnostics.suspect_picture import findings

    report = Report(findings(distrusted(context, root, image)), {"processor": machine.processor()})
    if as_json:
        say_json(report.values())
    else:
        say_all(report, "this image is right")
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        save.write_text(json.dumps(report.values(), indent=1) + "\n")
    if not report.ok:
        raise typer.Exit(1)


def _soaked(found: Doctor, models: list[Model], wanted: tuple[int, float], plot: Path) -> list[Finding]:
    from safelight.diagnostics import soak

    images, seconds = wanted

    def enough(count: int, spent: float) -> bool:
        return count >= images if images else spent >= seconds

    with bar("soaking") as update:
        soaked = soak.soak(found.engine, models, enough, lambda count: update(count, images, "images"))
    soak.plot(soaked, plot)
    return soaked.findings()


RIGHT = "images made on this machine are right"


def say_all(report: Report, right: str = RIGHT) -> None:
    """Print the report for users. ``right``: the conclusion if all checks passed."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    before = ""
    for finding in report.findings:
        if finding.suspect != before:
            console.print(f"\n[bold]{TITLES[finding.suspect]}[/bold]")
            before = finding.suspect
        sign = "[green]right[/green]" if finding.ok else "[red]WRONG[/red]"
        console.print(f"  {sign}  {escape(f'{finding.what}: {finding.evidence}')}")
        if finding.todo:
            console.print(f"         {finding.todo}", markup=False)
    wrong = sum(not finding.ok for finding in report.findings)
    if wrong:
        console.print(f"\n{wrong} of {len(report.findings)} checks failed. The cause is most likely: {report.cause}.")
    else:
        console.print(f"\nAll {len(report.findings)} checks passed: {right}.")
