"""What the sections of ``tools/gpu.py`` share: the findings, and the device with the models that it computes."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safelight.devices.base import Device


@dataclass(frozen=True)
class Finding:
    """What a section found.

    ``ok``: whether it is right; None for what has no right value, such as a time, and for what is impossible here.
    ``figures``: numbers, by names with their units.
    """

    what: str
    ok: bool | None
    evidence: str
    figures: Mapping[str, float] = field(default_factory=dict[str, float])
    section: str = ""

    def words(self) -> str:
        figures = "; ".join(f"{name} {value:.4g}" for name, value in self.figures.items())
        return " ".join(". ".join(part for part in (self.evidence, figures) if part).split())

    def line(self) -> str:
        mark = {True: "ok ", False: "BAD", None: "   "}[self.ok]
        return f"{mark} {self.section:<11} {self.what}: {self.words()}"


@dataclass(frozen=True)
class Machine:
    """The device, and the models that it computes.

    ``folder``: for models and data.
    ``small``: use tiny models only, and few repetitions.
    """

    device: Device
    folder: Path
    small: bool

    def settings(self, **given: Any) -> Any:
        from safelight.settings_sources import load_settings

        root = self.folder / "root"
        root.mkdir(parents=True, exist_ok=True)
        return load_settings(root, None, **{"device": self.device.name, **given})

    def weights_within(self, nbytes: float) -> dict[str, float]:
        """Return the setting that limits the weights where the device computes."""
        name = "max_cache_vram_gb" if self.device.has_own_memory else "max_cache_ram_gb"
        return {name: nbytes / (1 << 30)}

    @contextlib.contextmanager
    def engine(self, **given: Any) -> Generator[Any]:
        """Open an engine on the device with these settings, and close it at the end of the context."""
        from safelight.assembly.engine import open_engine

        opened = open_engine(self.settings(**given), self.device)
        try:
            yield opened
        finally:
            opened.close()

    def tiny(self, name: str) -> Path:
        """Return the path of a tiny checkpoint with seeded random weights."""
        from support import checkpoints

        base, seed = TINY[name]
        path = self.folder / "tiny" / f"{name}.safetensors"
        return path if path.exists() else written(path, lambda part: checkpoints.write_single(part, base, seed))

    def lora(self) -> Path:
        """Return the path of a LoRA for the tiny checkpoints of SD 1."""
        from support import adapters

        path = self.folder / "tiny/lora.safetensors"
        return path if path.exists() else written(path, adapters.write)

    def models(self) -> dict[str, Path]:
        """Return the paths of two checkpoints of SD 1.5's size, or of tiny ones."""
        if self.small:
            return {"A": self.tiny("a"), "B": self.tiny("b")}
        return {name: self.folder / f"{name}.safetensors" for name in "AB"}

    @property
    def diffusers_can_use_it(self) -> bool:
        return self.device.name in ("cuda", "mps", "cpu")

    def wait(self) -> None:
        """Return when everything submitted to the device is done."""
        self.device.record_fence().wait()

    def free_caches(self) -> None:
        import torch

        gc.collect()
        if self.device.name in ("cuda", "mps"):
            getattr(torch, self.device.name).empty_cache()


TINY = {"a": ("sd1", 1), "b": ("sd1", 2), "sdxl": ("sdxl", 4)}


def written(path: Path, write: Callable[[Path], object]) -> Path:
    """Write a file under another name first, so that a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"part-{path.name}")
    write(part)
    return part.rename(path)
