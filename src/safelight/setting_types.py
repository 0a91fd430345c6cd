"""The types of settings that need more than pydantic: lists, mappings, devices, and how texts become them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from safelight.extensions import extensions
from safelight.request.run_settings import AttentionType


def default_root() -> Path:
    """Return the platform's folder for the user's data of Safelight."""
    from platformdirs import user_data_path

    return user_data_path("safelight", appauthor=False)


def parse_yaml(value: object) -> object:
    """Parse text from a variable or the command line, such as ``{sdxl: sliced, my-model: normal}``."""
    if not isinstance(value, str):
        return value
    import yaml  # takes 10 ms, and most commands read no YAML

    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError("is not YAML") from error


def split_folders(value: object) -> object:
    """Split text into folders. Text is a YAML list, or has the system's separator (``:``; on Windows ``;``)."""
    if isinstance(value, str) and not value.startswith("["):
        return [part for part in value.split(os.pathsep) if part]
    return parse_yaml(value)


def split_words(value: object) -> object:
    """Split text into words. Text is a YAML list, or has commas."""
    if isinstance(value, str) and not value.startswith("["):
        return [part.strip() for part in value.split(",") if part.strip()]
    return parse_yaml(value)


def number_to_text(value: object) -> object:
    """Turn a whole number into text."""
    return str(value) if isinstance(value, int) else value


def check_root_path(path: str) -> str:
    """Return a path of a URL. Raises ValueError unless it is empty, or begins with a slash and ends without one."""
    if path and not re.fullmatch(r"(/[\w.~-]+)+", path):
        raise ValueError("must begin with a slash and not end with one, such as /safelight")
    return path


def make_absolute(path: Path) -> Path:
    """Return an absolute path; ``~`` is the user's home."""
    return path.expanduser().absolute()


DEVICES = ("auto", "cpu", "cuda", "mps", "simulated")
DEVICE_GROUP = "safelight.devices"


def check_device(name: str) -> str:
    """Return the name of a device. Raises ValueError if there is none."""
    if name not in DEVICES and name not in extensions(DEVICE_GROUP):
        raise ValueError("is neither a built-in device nor that of an installed package")
    return name


AnyDevice = Annotated[str, AfterValidator(check_device)]
AttentionTypes = Annotated[dict[str, AttentionType], BeforeValidator(parse_yaml)]
Folders = Annotated[tuple[Path, ...], BeforeValidator(split_folders)]
Words = Annotated[tuple[str, ...], BeforeValidator(split_words)]
