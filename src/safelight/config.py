"""Settings, from ``SAFELIGHT_*`` variables; a flag on the command line goes above them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from platformdirs import user_data_path
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from safelight.errors import SettingError
from safelight.types import Attention, Precision


class Settings(BaseSettings):
    """``max_cache_ram_gb``: bytes (2^30) for models, None for a share of what can be had. ``threads``: None for all
    cores."""

    model_config = SettingsConfigDict(env_prefix="SAFELIGHT_", extra="ignore")

    root: Path = Field(default_factory=lambda: user_data_path("safelight", appauthor=False))
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Precision = "auto"
    attention_type: Attention = "torch-sdp"
    threads: int | None = Field(default=None, ge=1, le=1024)
    max_cache_ram_gb: float | None = Field(default=None, gt=0)


def load(root: Path | None = None) -> Settings:
    """The settings. ``root`` goes above ``SAFELIGHT_ROOT``. Raises SettingError, naming the variable."""
    try:
        settings = Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise SettingError(name, first["input"], f"SAFELIGHT_{name.upper()}", first["msg"]) from error
    chosen = root or settings.root
    return settings.model_copy(update={"root": chosen.expanduser().absolute()})
