"""Checks the scheduler of a diffusers folder whose noise levels have the same shift for all sizes of images."""

from __future__ import annotations

from safelight.errors import UnsupportedModelError
from safelight.files.folder import Folder


def require_shift(folder: Folder, family: str, shift: float) -> None:
    """Raise UnsupportedModelError if a folder's scheduler has another shift, or one that depends on the size.

    ``family``: its name, for the error.
    """
    for key, value in (("shift", shift), ("use_dynamic_shifting", False)):
        said = folder.scheduler.get(key, value)
        if said != value:
            problem = f"scheduler/scheduler_config.json says {key} = {said}; {family} has {value}"
            raise UnsupportedModelError(folder.path, problem)
