"""The command ``safelight``. It runs the active environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from safelight import installation


def run() -> None:
    """Run the console script. If another environment is active, this process becomes that environment's command."""
    prefix = Path(sys.prefix)
    home = installation.first(prefix)
    state = installation.state(home)
    if state.gone:
        print(f"safelight: the environment {state.gone} is gone; using {home} instead", file=sys.stderr)
    active = installation.folder(home, state.active)
    # A rollback runs in the first environment, so that it works even if the active environment is broken.
    if sys.argv[1:2] == ["rollback"]:
        active = home
    if active != prefix:
        python = installation.python_of(active)
        # -P: like the console script, the command does not import modules from the current folder.
        os.execv(python, [str(python), "-P", "-m", "safelight.cli", *sys.argv[1:]])
    from safelight.cli.main import run as run_here

    run_here()
