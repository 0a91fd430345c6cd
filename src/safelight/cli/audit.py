"""``safelight audit``: compares the images of any image server, as the doctor does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from safelight.cli.common import JsonOption, bar, say_json
from safelight.errors import InputError

EXAMPLES = (
    "Examples: `safelight audit http://127.0.0.1:7860 --api a1111 --save before.json`, then start that server again "
    "and `safelight audit http://127.0.0.1:7860 --api a1111 --before before.json`"
)


def audit(
    url: Annotated[str, typer.Argument(help="The server's address.", show_default=False)],
    api: Annotated[str, typer.Option(help="safelight, a1111, openai, invoke or comfy.")] = "safelight",
    models: Annotated[list[str] | None, typer.Option("--model", "-m", help="Only these; all by default.")] = None,
    key: Annotated[str | None, typer.Option(help="A bearer token, if the server requires one.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often the audit returns to every model.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 4,
    size: Annotated[int, typer.Option(min=8, help="Pixels per side.")] = 256,
    prompt: Annotated[str, typer.Option(help="What to draw.")] = "a red apple on a white table",
    save: Annotated[Path | None, typer.Option(help="Write the report to a file.")] = None,
    before: Annotated[Path | None, typer.Option(help="A saved report from before the server's restart.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the first images and those that differ.")] = Path("out/audit"),
    as_json: JsonOption = False,
) -> None:
    """Request the same images from any image server in many orders, and say which differ. Exit code 1 if any does."""
    from safelight.cli.doctor import say_all
    from safelight.diagnostics import audit as auditing
    from safelight.diagnostics.audited_servers import APIS, ImageRequest
    from safelight.diagnostics.report import Report, in_order
    from safelight.errors import UnreadableFileError

    if api not in APIS:
        raise InputError(f"--api {api}: must be one of {', '.join(APIS)}")
    earlier: Any = None
    if before is not None:
        try:
            earlier = json.loads(before.read_text())["digests"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UnreadableFileError(before, f"is not a report of an audit ({error})") from error
    server = APIS[api](url, key)
    known = server.models()
    chosen = models or known
    if missing := [name for name in chosen if name not in known]:
        raise InputError(f"the server has no model {', '.join(missing)}; it has {', '.join(known) or 'none'}")
    if not chosen:
        raise InputError("the server lists no models")
    asked = ImageRequest(prompt, 7, steps, size)
    with bar("auditing") as update:
        audited = auditing.audit(server, chosen, asked, rounds, earlier, lambda count: update(count, 0, "images"))
    audited.save(out)
    report = Report(in_order(audited.findings), {"server": url, "api": api, "models": ", ".join(chosen)})
    values = {**report.values(), "digests": audited.digests(), "images": str(out)}
    if as_json:
        say_json(values)
    else:
        say_all(report)
        typer.echo(f"{out}: the images")
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        save.write_text(json.dumps(values, indent=1) + "\n")
    if not report.ok:
        raise typer.Exit(1)
