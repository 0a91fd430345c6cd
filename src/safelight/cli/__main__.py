"""``python -m safelight.cli``: the same as the ``safelight`` command."""

from safelight.cli.main import run

run()
