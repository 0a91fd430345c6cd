"""The command line. Each command imports what it needs when it runs, so that ``--help`` and lists are fast."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from safelight import logs
from safelight.cli import (
    adapters,
    audit,
    backup,
    config,
    demo,
    doctor,
    gallery,
    generate,
    grid,
    identify,
    importing,
    mcp,
    memory,
    models,
    png_info,
    preprocess,
    remake,
    serve,
    show,
    top,
    upgrade,
    users,
)
from safelight.cli.common import Commands, GlobalOptions
from safelight.cli.interrupts import wait_for_imports
from safelight.errors import ANSWERS, Cancelled, SafelightError, answer_to
from safelight.version import VERSION

app = typer.Typer(
    name="safelight",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Switch Stable Diffusion checkpoints all day; the same request gives the same pixels.",
    epilog='Example: `safelight generate "red apple" -m starter-noto -m starter-fluent --seed 0`',
)
app.add_typer(models.app, name="models")
app.add_typer(adapters.app, name="adapters")
app.add_typer(gallery.app, name="gallery")
app.add_typer(config.app, name="config")
app.add_typer(users.app, name="users")
app.command("generate", epilog=generate.EXAMPLES)(generate.generate)
app.command("remake", epilog=remake.EXAMPLES)(remake.remake)
app.command("demo", epilog="Example: `safelight demo --out out/demo`")(demo.demo)
app.command("grid", epilog=grid.EXAMPLES)(grid.grid)
app.command("preprocess", epilog=preprocess.EXAMPLES)(preprocess.preprocess)
app.command("png-info", epilog=png_info.EXAMPLES)(png_info.png_info)
app.command("show", epilog=show.EXAMPLES)(show.show)
app.command("memory", epilog=memory.MEMORY_EXAMPLES)(memory.memory)
app.command("fits", epilog=memory.FITS_EXAMPLES)(memory.fits)
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor)
app.command("audit", epilog=audit.EXAMPLES)(audit.audit)
app.command("upgrade", epilog=upgrade.UPGRADE_EXAMPLES)(upgrade.upgrade)
app.command("backup", epilog=backup.BACKUP_EXAMPLE)(backup.backup)
app.command("restore", epilog=backup.RESTORE_EXAMPLE)(backup.restore)
app.command("top", epilog=top.EXAMPLES)(top.top)
app.command("rollback", epilog=upgrade.ROLLBACK_EXAMPLES)(upgrade.rollback)
app.command("serve", epilog=serve.EXAMPLES)(serve.serve)
app.command("mcp", epilog=mcp.EXAMPLES)(mcp.mcp)
app.command("identify", epilog=identify.EXAMPLES)(identify.identify)
app.command("import", epilog=importing.EXAMPLES)(importing.import_programs)


@app.command("help", epilog="Example: `safelight help models add`")
def show_help(
    context: typer.Context,
    command: Annotated[list[str] | None, typer.Argument(help="A command.", show_default=False)] = None,
) -> None:
    """Show the help of a command, like --help behind it."""
    assert context.parent is not None
    app(
        [*(command or ()), "--help"],
        prog_name=context.parent.info_name,
        standalone_mode=False,
    )


@app.command("version", epilog="Example: `safelight version`")
def show_version() -> None:
    """Show the version."""
    _version(asked=True)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"safelight {VERSION}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    root: Annotated[
        Path | None,
        typer.Option(help="The folder for all data; overrides SAFELIGHT_ROOT. Default: the platform's data folder."),
    ] = None,
    config_file: Annotated[
        Path | None,
        typer.Option("--config", help="A settings file: safelight.yaml, or InvokeAI's invokeai.yaml."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps or simulated; overrides SAFELIGHT_DEVICE.")] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options before the command apply to every command."""
    del version
    logs.to_stderr()
    context.obj = GlobalOptions(root, config_file, device)


def run() -> None:
    """Run a command. :data:`safelight.errors.ANSWERS` has the exit code of each error; 0 is done."""
    if sys.platform == "win32":
        _fail("Windows is not supported; use WSL 2 (docs/structure.md lists what a port would have to change)", 2)
    try:
        with wait_for_imports():
            app()
    except (Cancelled, KeyboardInterrupt):
        _cancelled()
    except SystemExit as stop:
        # Typer turns an interrupt into SystemExit and prints nothing.
        if stop.code == CANCELLED:
            _cancelled()
        raise
    except SafelightError as error:
        _fail(str(error), answer_to(type(error)).exit_code)
    except BrokenPipeError:
        sys.exit(1)


CANCELLED = ANSWERS[Cancelled].exit_code


def _cancelled() -> None:
    # An interrupt inside exec() of a string leaves a mark in CPython, and `python -m` then ends by SIGINT, whatever the
    # exit code is. (Dataclasses and named tuples call exec() while modules are imported.) Any later exec() of a string
    # clears the mark.
    exec("")
    _fail("cancelled", CANCELLED)


def _fail(message: str, code: int) -> None:
    typer.echo(f"safelight: {message}", err=True)
    sys.exit(code)
