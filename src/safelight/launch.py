"""The command ``safelight``: runs the environment that is active."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from safelight import installation


def run() -> None:
    """The console script. It becomes the command of the active environment, where that is another one."""
    prefix = Path(sys.prefix)
    home = installation.first(prefix)
    state = installation.state(home)
    if state.gone:
        print(f"safelight: the environment {state.gone} is gone; {home} is used instead", file=sys.stderr)
    active = installation.folder(home, state.active)
    # An environment that does not work must not stand in the way of leaving it.
    if sys.argv[1:2] == ["rollback"]:
        active = home
    if active != prefix:
        python = installation.python_of(active)
        # As a script has it, the current folder holds no modules (-P).
        os.execv(python, [str(python), "-P", "-m", "safelight.cli", *sys.argv[1:]])
    from safelight.cli.main import run as run_here

    run_here()
