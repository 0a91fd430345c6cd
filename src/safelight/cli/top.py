"""``safelight top``: what the slots of a running server do, live."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.cli.common import JsonOption, RootOption, loaded, say_json
from safelight.errors import InputError

if TYPE_CHECKING:
    import httpx
    from rich.table import Table

EXAMPLES = "Examples: `safelight top` · `safelight top --once` · `safelight top --json`"

RATE_SECONDS = 60.0
"""Rates are means over this time."""


def top(
    context: typer.Context,
    server: Annotated[
        str | None, typer.Option(help="The server's address; by default, the running server of the root.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print once, and end.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.2)] = 1.0,
    as_json: JsonOption = False,
    root: RootOption = None,
) -> None:
    """Show each slot of a running server: its job and progress, the models in its memory, and the queue."""
    import httpx

    from safelight.workers import running_server

    settings = loaded(context, root).settings
    url = server or running_server.find(settings.root)
    if url is None:
        raise InputError(
            f"no server runs for {settings.root}: start one with `safelight serve`, or name it by --server"
        )
    key = settings.api_key
    headers = {} if key is None else {"Authorization": f"Bearer {key.get_secret_value()}"}
    with httpx.Client(base_url=url, headers=headers, timeout=10) as client:
        try:
            if as_json:
                say_json(_look(client))
                return
            _show(client, once, every)
        except httpx.HTTPStatusError as error:
            raise InputError(f"{url} answers {error.response.status_code}: {error.response.text[:200]}") from error
        except httpx.TransportError as error:
            raise InputError(f"{url} does not answer: {error}") from error


def _look(client: httpx.Client) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    for name, path in (("health", "/api/v1/health"), ("slots", "/api/v1/slots"), ("queue", "/api/v1/queue?limit=200")):
        answer = client.get(path)
        answer.raise_for_status()
        answers[name] = answer.json()
    newest = client.get("/api/v1/jobs", params={"state": "done", "limit": 1000})
    newest.raise_for_status()
    since = time.time() - RATE_SECONDS
    images = sum(job["images"] for job in newest.json() if (job["ended"] or 0) >= since)
    return {**answers, "images_per_minute": images * 60 / RATE_SECONDS}


def _show(client: httpx.Client, once: bool, every: float) -> None:
    from rich.console import Console
    from rich.live import Live

    if once:
        Console().print(_table(_look(client)))
        return
    with Live(_table(_look(client)), refresh_per_second=4, screen=False) as live:
        while True:
            time.sleep(every)
            live.update(_table(_look(client)))


def _table(seen: dict[str, Any]) -> Table:
    from rich.table import Table

    queue, health = seen["queue"], seen["health"]
    state = "paused" if health["paused"] else health["problem"] or "running"
    title = f"{state} · {len(queue['waiting'])} waiting · {seen['images_per_minute']:.1f} images/min"
    table = Table(title=title, title_justify="left")
    for name in ("slot", "state", "job", "progress", "in memory", "switches", "restarts"):
        table.add_column(name)
    running = {one["slot"]: one for one in queue["running"]}
    for slot in seen["slots"]:
        now = running.get(slot["name"])
        job = "" if now is None else f"{now['job']['model']}: {now['job']['request']['prompt'][:40]}"
        state = slot["problem"] or ("draining" if slot["draining"] else slot["worker"] if now is None else "busy")
        resident = ", ".join(slot["resident"])
        counts = str(slot["switches"]), str(slot["restarts"])
        table.add_row(slot["name"], state, job, _progress(now), resident, *counts)
    return table


def _progress(running: dict[str, Any] | None) -> str:
    progress = None if running is None else running["progress"]
    if progress is None:
        return ""
    if progress["stage"] != "denoise":
        return str(progress["stage"])
    return f"image {progress['image'] + 1}, step {progress['step']} of {progress['steps']}"
