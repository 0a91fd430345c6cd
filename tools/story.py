"""Inject each of the four suspects into the running program, and write what happens: ``docs/the-story.md``.

``make story``, or ``python tools/story.py FILE``. The program writes the pictures beside the page, as
``story-NAME.png``. It injects each fault twice: once without the check that finds the fault, as in a program that lacks
the check, and once with it. The exit code is 1 if a fault spoils nothing, or if Safelight does not do what the page
says.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PILImage
from structlog.testing import capture_logs
from torch import nn

import safelight
from safelight.assembly.engine import open_engine
from safelight.assembly.programs import WORKER
from safelight.boundary import kernels
from safelight.devices.simulated import Simulated
from safelight.diagnostics.canary import Canaries, after_switch
from safelight.diagnostics.image_difference import difference
from safelight.errors import SafelightError
from safelight.models.fingerprint import Fingerprint
from safelight.request.results import Image
from safelight.settings_sources import load_settings
from safelight.workers.fresh_process import FreshProcesses
from safelight.workers.local_engine import LocalEngine

BEFORE, MODEL = "starter-twemoji", "starter-fluent"
"""The model that is used before the fault, and the model that draws."""

PROMPT = "red apple"
SEED = 7
STEPS = 12
SHOWN = 192
"""Side of a picture on the page, in pixels."""

LARGE_BYTES = 1 << 20
"""In the last chapter, copies of more bytes than this go wrong."""

LATE_BYTES = 4096
"""Bytes by which the source of a wrong copy has moved on."""

Inject = Callable[[LocalEngine], AbstractContextManager[None]]


@dataclass(frozen=True)
class Suspect:
    """One suspect that the reports name.

    ``what``: the fault that the program injects.
    ``rule``: what Safelight always does about this suspect.
    ``blind``: the settings that turn off the check that finds the fault.
    ``blinded``: a context without the check, where no setting turns it off.
    ``expected``: the first words of the sentence that names the fault.
    ``canary``: whether a canary follows each switch.
    ``simulated``: whether the simulated accelerator computes.
    """

    name: str
    title: str
    what: str
    rule: str
    inject: Inject
    blind: dict[str, Any]
    blinded: Callable[[], AbstractContextManager[None]]
    expected: str
    canary: bool = False
    simulated: bool = False


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Generator[None]:
    """Set ``owner.name`` to ``value`` while the context lasts."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def nothing() -> Generator[None]:
    yield


def fingerprints_blinded() -> AbstractContextManager[None]:
    """Make every module look unchanged since it was built."""

    def none(_: Fingerprint) -> list[str]:
        return []

    return patched(Fingerprint, "differences", none)


@contextmanager
def state_left_over(engine: LocalEngine) -> Generator[None]:
    """Leave a hook of the last model on the UNet; it adds noise to the output of each block."""
    handles: list[Any] = []
    for key, skeleton in engine.resources.skeletons._free.items():
        if key.role == "unet":
            unet: Any = skeleton.module
            blocks = (*unet.down_blocks, *unet.up_blocks)
            handles += [block.register_forward_hook(_add_noise) for block in blocks]
    yield
    for handle in handles:
        handle.remove()


def _add_noise(_: nn.Module, __: Any, output: Any) -> Any:
    hidden = output[0] if isinstance(output, tuple) else output
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(SEED)) * hidden.std()
    return (hidden + noise, *output[1:]) if isinstance(output, tuple) else hidden + noise


@contextmanager
def misplaced_tensors(engine: LocalEngine) -> Generator[None]:
    """Exchange, in memory, pairs of the UNet's tensors that have the same shape."""
    _exchange(engine)
    yield


def _exchange(engine: LocalEngine) -> None:
    """It is a separate function, so that no reference to the weights outlives it."""
    by_shape: dict[torch.Size, list[torch.Tensor]] = {}
    for piece, held in engine.resources.residency.table.residents.items():
        if piece.component_key.startswith("unet"):
            for tensor in held.buffer.tensors.values():
                by_shape.setdefault(tensor.shape, []).append(tensor)
    with torch.inference_mode():
        for tensors in by_shape.values():
            for one, other in zip(tensors[::2], tensors[1::2], strict=False):
                before = one.clone()
                one.copy_(other)
                other.copy_(before)


def broken_kernel(_: LocalEngine) -> AbstractContextManager[None]:
    """Make the attention kernel return its values in the wrong order."""
    original = kernels.AttnProcessor2_0.__call__

    def call(self: Any, attn: Any, hidden: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        out = original(self, attn, hidden, *more, **named)
        return out.flip(1, 2) if out.ndim == 3 else out

    return patched(kernels.AttnProcessor2_0, "__call__", call)


def memory_reused_early(engine: LocalEngine) -> AbstractContextManager[None]:
    """Make large copies to the device read their source after the next bytes have overwritten it."""
    engine.loaded.unload(None)
    push = engine.resources.device.push

    def late(source: torch.Tensor, target: torch.Tensor) -> Any:
        return push(source.roll(-LATE_BYTES) if source.numel() > LARGE_BYTES else source, target)

    return patched(engine.resources.device, "push", late)


SUSPECTS = (
    Suspect(
        "state",
        "State left over from the last model",
        "The last model leaves hooks on the blocks of the UNet, as extensions and merged LoRAs do. The next model "
        "uses the same modules.",
        "Safelight compares each skeleton (the module without weights) with its fingerprint before and after each job. "
        "It drops a skeleton that differs, and builds a new one.",
        state_left_over,
        {},
        fingerprints_blinded,
        "log: a skeleton changed since it was built",
    ),
    Suspect(
        "loading",
        "A misplaced tensor",
        "The program exchanges tensors of the UNet in memory, in pairs of the same shape. Every name and shape is "
        "still right.",
        "After a stage, Safelight computes checksums of the weights in memory and compares them with the checksums "
        "of the bytes that it read. It checks the weights after their first use. Later it checks them as often as "
        "possible within 2 % of the computing time. It reads wrong weights again and repeats the stage. The messages "
        "name each group of wrong weights by its first and its last module.",
        misplaced_tensors,
        {"verify_transfers": "off"},
        nothing,
        "warning: repaired: weights were corrupted in memory",
    ),
    Suspect(
        "attention",
        "A broken attention kernel",
        "The attention kernel begins to return its values in the wrong order. It passed its self-test earlier. This "
        "simulates a driver update that breaks a kernel that used to work.",
        "Safelight compares each kernel with float64 before its first use on a device. With `canary: switch`, it "
        "makes a tiny image after each switch and compares it with the image of a fresh process. Without that "
        "setting, Safelight delivers the wrong picture, until `safelight doctor` tests the kernel again. If a kernel "
        "is also broken in fresh processes, the canary cannot find the fault, but the self-test does.",
        broken_kernel,
        {},
        nothing,
        "error: the canary",
        canary=True,
    ),
    Suspect(
        "memory",
        "Memory that is reused too early",
        "Large copies to the accelerator read their source too late: other weights have already overwritten it. The "
        "accelerator, which is simulated, reports these copies as done.",
        "Safelight waits for each copy. Here that is not enough, so it also computes the checksum of the bytes on the "
        "accelerator: when they arrive, or after the first stage that uses them. After one wrong copy, it checks every "
        "further copy when it arrives, and repeats a wrong one.",
        memory_reused_early,
        {"verify_transfers": "off"},
        nothing,
        "log: a copy arrived",
        simulated=True,
    ),
)


@dataclass
class Outcome:
    """What happened with one suspect: the pictures (None where Safelight delivered none), and Safelight's messages."""

    right: Image
    spoiled: Image | None
    found: Image | None
    says: list[str]
    after: Image


def draw(engine: LocalEngine, model: str) -> Image:
    return next(engine.generate(safelight.Request(PROMPT, model, seed=SEED, steps=STEPS)))


@contextmanager
def opened(suspect: Suspect, root: Path, blind: bool) -> Generator[LocalEngine]:
    """Open an engine, with or without the suspect's check, and use both models in it."""
    overrides = suspect.blind if blind else {}
    settings = load_settings(root, None, attention_type="torch-sdp", **overrides)
    device = Simulated(nbytes=512 << 20) if suspect.simulated else None
    engine = open_engine(settings, device)
    if suspect.canary and not blind:
        fresh = FreshProcesses(WORKER, settings, engine.catalog)
        engine.on_switch = after_switch(Canaries(root, fresh.make_first_image), engine.image_repairer)
    try:
        for name in (MODEL, BEFORE):
            draw(engine, name)
        yield engine
    finally:
        engine.close()
        if device is not None:
            device.close()


def attempt(engine: LocalEngine) -> tuple[Image | None, list[str]]:
    """Draw a picture; it (None if Safelight delivered none), and Safelight's messages about it."""
    with capture_logs() as logs:
        try:
            image = draw(engine, MODEL)
            said = [f"warning: {text}" for text in image.warnings]
            said += [f"in the picture's metadata: {r['wrong']}; {r['helped']}" for r in image.metadata["repairs"]]
        except SafelightError as error:
            image, said = None, [f"error: {error}"]
    logged = [
        "log: "
        + entry["event"]
        + "".join(f", {k}: {_shown(v)}" for k, v in entry.items() if k in ("why", "what", "changed"))
        for entry in logs
        if entry["log_level"] != "info"
    ]
    return image, [*logged, *said]


def _shown(value: Any) -> str:
    """Return the first item of a list and the number of the others, or the value as text."""
    if not isinstance(value, list) or len(value) < 2:
        return str(value)
    return f"{value[0]}, and {len(value) - 1} more"


def examine(suspect: Suspect, root: Path) -> Outcome:
    """Inject the fault twice, without the check and with it, then remove it."""
    with opened(suspect, root, blind=True) as engine:
        right = draw(engine, MODEL)
        draw(engine, BEFORE)
        with suspect.inject(engine), suspect.blinded():
            spoiled, _ = attempt(engine)
    with opened(suspect, root, blind=False) as engine:
        with suspect.inject(engine):
            found, says = attempt(engine)
        after = draw(engine, MODEL)
    return Outcome(right, spoiled, found, says, after)


def strip(outcome: Outcome, path: Path) -> None:
    """Write the right picture, the wrong one and Safelight's side by side."""
    images = [outcome.right, outcome.spoiled, outcome.found]
    sheet = PILImage.new("RGB", (SHOWN * 3 + 16, SHOWN), "white")
    for place, image in enumerate(images):
        if image is not None:
            picture = PILImage.frombytes("RGB", (image.width, image.height), image.pixels)
            sheet.paste(picture.resize((SHOWN, SHOWN), PILImage.Resampling.NEAREST), (place * (SHOWN + 8), 0))
    sheet.save(path, optimize=True)


def chapter(suspect: Suspect, outcome: Outcome, picture: str) -> list[str]:
    assert outcome.spoiled is not None
    apart = difference(*(_array(image) for image in (outcome.right, outcome.spoiled)))
    settings = "`canary: switch`, which is not the default" if suspect.canary else "the default settings"
    same = outcome.found is not None and outcome.found.pixels == outcome.right.pixels
    does = (
        "The picture is right, pixel for pixel."
        if same
        else "Safelight delivers no picture. The job fails with this error."
    )
    return [
        f"## {suspect.title}",
        "",
        suspect.what,
        "",
        f"![{suspect.title}: the right picture, the wrong one, and Safelight's]({picture})",
        "",
        "Left: the right picture. "
        f"Middle: the same request with the fault and without the check that is described below "
        f"(difference: {apart}). "
        f"Right: the same request with the fault and {settings}{'' if same else '; there is no picture'}.",
        "",
        suspect.rule,
        "",
        "The messages of Safelight:",
        "",
        *(f"    {line}" for line in outcome.says),
        "",
        f"The result: {does} When the fault is gone, the next picture in the same process is right, pixel for pixel.",
        "",
    ]


def _array(image: Image) -> Any:
    import numpy as np

    return np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3)


def problems(suspect: Suspect, outcome: Outcome) -> list[str]:
    """Where the outcome differs from what the page says."""
    wrong: list[str] = []
    if outcome.spoiled is None or outcome.spoiled.pixels == outcome.right.pixels:
        wrong.append("the fault spoils nothing")
    if outcome.found is not None and outcome.found.pixels != outcome.right.pixels:
        wrong.append("Safelight delivers a wrong picture")
    if not any(line.startswith(suspect.expected) for line in outcome.says):
        wrong.append(f"no message begins with {suspect.expected!r}")
    if outcome.after.pixels != outcome.right.pixels:
        wrong.append("the next picture is wrong")
    return [f"{suspect.name}: {what}" for what in wrong]


HEADING = """# The story

Users of a well-known image generator switched between a few checkpoints. Then every image turned to noise until they
restarted the program. The reports named four suspects, and nobody found the cause. `make story` injects each suspect as
a fault into the running program, and writes this page and its pictures.

Each chapter has four steps: one model draws, a second model draws, the program injects the fault, and the first model
draws again.
"""


def write(page: Path, suspects: Sequence[Suspect] = SUSPECTS) -> list[str]:
    """Write the page and its pictures; where the outcomes differ from what the page says."""
    lines, wrong = [HEADING], list[str]()
    with ExitStack() as stack:
        for suspect in suspects:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            outcome = examine(suspect, root)
            wrong += problems(suspect, outcome)
            if outcome.spoiled is not None:
                picture = page.with_name(f"story-{suspect.name}.png")
                strip(outcome, picture)
                lines += chapter(suspect, outcome, picture.name)
    page.write_text("\n".join(lines).rstrip() + "\n")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=Path("docs/the-story.md"))
    parser.add_argument("--suspect", choices=[suspect.name for suspect in SUSPECTS], help="only this one")
    given = parser.parse_args()
    wrong = write(given.file, [s for s in SUSPECTS if given.suspect in (None, s.name)])
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{given.file}: {len(wrong)} problems")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
