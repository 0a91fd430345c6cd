"""Injects each of the four suspects into the running program, and writes what happens: ``docs/the-story.md``.

``make story``, or ``python tools/story.py FILE``. The pictures are written beside the page, as ``story-NAME.png``. Each
fault is injected twice: once with the check that finds it switched off, as in a program without that check, and once as
Safelight runs. The exit code is 1 when a fault spoils nothing or when Safelight does not do what the page says.
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
from safelight import config
from safelight.arch.diffusers_fence import kernels
from safelight.arch.fingerprint import Fingerprint
from safelight.assemble.serving import WORKER
from safelight.assemble.worker import open_engine
from safelight.devices.simulated import Simulated
from safelight.engine.fresh import Fresh
from safelight.engine.local import LocalEngine
from safelight.errors import SafelightError
from safelight.request.results import Image
from safelight.trust.canary import Canaries, after_switch
from safelight.trust.difference import difference

BEFORE, MODEL = "starter-twemoji", "starter-fluent"
"""The model that was used before the fault, and the one that draws."""

PROMPT = "red apple"
SEED = 7
STEPS = 12
SHOWN = 192
"""Pixels of a picture's side on the page."""

LARGE_BYTES = 1 << 20
"""Copies of more go wrong in the last chapter."""

LATE_BYTES = 4096
"""By which their source has moved on."""

Inject = Callable[[LocalEngine], AbstractContextManager[None]]


@dataclass(frozen=True)
class Suspect:
    """One suspect of the reports.

    ``what``: the fault that is injected. ``rule``: what Safelight does about that suspect at all times.
    ``blind``: settings that switch off the check which finds it; ``blinded`` does so where no setting does.
    ``expected``: how the sentence begins that names the fault. ``canary``: whether each switch is to be followed by a
    canary. ``simulated``: on the simulated accelerator.
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
    """Within, ``owner.name`` is ``value``."""
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
    """Every module passes for one that is as it was built."""

    def none(_: Fingerprint) -> list[str]:
        return []

    return patched(Fingerprint, "differences", none)


@contextmanager
def state_left_over(engine: LocalEngine) -> Generator[None]:
    """A hook of the last model stays on the UNet, and adds that model's values to the output of each block."""
    handles: list[Any] = []
    for key, skeleton in engine.bench.skeletons._free.items():
        if key.role == "unet":
            unet: Any = skeleton.module
            blocks = (*unet.down_blocks, *unet.up_blocks)
            handles += [block.register_forward_hook(_add_what_was_left) for block in blocks]
    yield
    for handle in handles:
        handle.remove()


def _add_what_was_left(_: nn.Module, __: Any, output: Any) -> Any:
    hidden = output[0] if isinstance(output, tuple) else output
    left = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(SEED)) * hidden.std()
    return (hidden + left, *output[1:]) if isinstance(output, tuple) else hidden + left


@contextmanager
def misplaced_tensors(engine: LocalEngine) -> Generator[None]:
    """Each two neighbours among the UNet's tensors that have the same shape are exchanged in memory."""
    _exchange(engine)
    yield


def _exchange(engine: LocalEngine) -> None:
    """In a function of its own, so that no reference to the weights outlives it."""
    by_shape: dict[torch.Size, list[torch.Tensor]] = {}
    for piece, held in engine.bench.residency._residents.items():
        if piece.component.startswith("unet"):
            for tensor in held.target.tensors.values():
                by_shape.setdefault(tensor.shape, []).append(tensor)
    with torch.inference_mode():
        for tensors in by_shape.values():
            for one, other in zip(tensors[::2], tensors[1::2], strict=False):
                before = one.clone()
                one.copy_(other)
                other.copy_(before)


def broken_kernel(_: LocalEngine) -> AbstractContextManager[None]:
    """The attention kernel returns its values in the wrong order."""
    original = kernels.AttnProcessor2_0.__call__

    def call(self: Any, attn: Any, hidden: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        out = original(self, attn, hidden, *more, **named)
        return out.flip(1, 2) if out.ndim == 3 else out

    return patched(kernels.AttnProcessor2_0, "__call__", call)


def memory_reused_early(engine: LocalEngine) -> AbstractContextManager[None]:
    """Large copies to the device read their source when the bytes that come after it are already there."""
    engine.unload(None)
    push = engine.bench.device.push

    def late(source: torch.Tensor, target: torch.Tensor) -> Any:
        return push(source.roll(-LATE_BYTES) if source.numel() > LARGE_BYTES else source, target)

    return patched(engine.bench.device, "push", late)


SUSPECTS = (
    Suspect(
        "state",
        "State left over from the last model",
        "The last model leaves hooks on the blocks of the UNet, as extensions and merged LoRAs do. The next model is "
        "bound to the same modules.",
        "A skeleton is compared with its fingerprint before and after each job. One that differs is dropped.",
        state_left_over,
        {},
        fingerprints_blinded,
        "log: a skeleton was left changed",
    ),
    Suspect(
        "loading",
        "A misplaced tensor",
        "Tensors of the UNet that have the same shape are exchanged in memory, two by two. Every name and shape is as "
        "it should be.",
        "Weights in memory are summed after a stage and compared with what was read: the first time, and then as often "
        "as that takes less than 2 % of the time. Wrong ones are read again, and the stage is repeated.",
        misplaced_tensors,
        {"verify_transfers": "off"},
        nothing,
        "warning: repaired: weights were changed in memory",
    ),
    Suspect(
        "attention",
        "A broken attention kernel",
        "The attention kernel begins to return its values in the wrong order. It had passed its self-test, as before a "
        "change of driver.",
        "Each kernel is compared with float64 before its first use on a device. With `canary: switch` a tiny image is "
        "compared with that of a fresh process after each switch. Without that setting such a picture is given, until "
        "`safelight doctor` tries the kernel again. One that is broken in fresh processes too fails its self-test.",
        broken_kernel,
        {},
        nothing,
        "error: the canary",
        canary=True,
    ),
    Suspect(
        "memory",
        "Memory that is reused too early",
        "Large copies to the accelerator read their source when other weights have already been written over it. The "
        "accelerator is simulated.",
        "Each copy is waited for. It is summed where it arrived, or after the first stage that uses it. Once one was "
        "wrong, every further copy is summed where it arrives, and is repeated when it is wrong.",
        memory_reused_early,
        {"verify_transfers": "off"},
        nothing,
        "log: a copy arrived",
        simulated=True,
    ),
)


@dataclass
class Told:
    """What happened to one suspect: the pictures (None where none was given), and the program's own sentences."""

    right: Image
    spoiled: Image | None
    found: Image | None
    says: list[str]
    after: Image


def draw(engine: LocalEngine, model: str) -> Image:
    return next(engine.generate(safelight.Request(PROMPT, model, seed=SEED, steps=STEPS)))


@contextmanager
def opened(suspect: Suspect, root: Path, blind: bool) -> Generator[LocalEngine]:
    """An engine in which both models have been used, with the suspect's check or without it."""
    overrides = suspect.blind if blind else {}
    settings = config.load(root, None, attention_type="torch-sdp", **overrides)
    device = Simulated(nbytes=512 << 20) if suspect.simulated else None
    engine = open_engine(settings, device)
    if suspect.canary and not blind:
        fresh = Fresh(WORKER, settings)
        engine.on_switch = after_switch(Canaries(root, fresh.made), engine.repairs)
    try:
        for name in (MODEL, BEFORE):
            draw(engine, name)
        yield engine
    finally:
        engine.close()
        if device is not None:
            device.close()


def tried(engine: LocalEngine) -> tuple[Image | None, list[str]]:
    """The picture, None when it was refused, and what the program says about it."""
    with capture_logs() as logs:
        try:
            image = draw(engine, MODEL)
            said = [f"warning: {text}" for text in image.warnings]
            said += [f"in the picture's metadata: {r['wrong']}; {r['helped']}" for r in image.metadata["repairs"]]
        except SafelightError as error:
            image, said = None, [f"error: {error}"]
    logged = [
        "log: " + entry["event"] + "".join(f", {k}: {v}" for k, v in entry.items() if k in ("why", "what", "changed"))
        for entry in logs
        if entry["log_level"] != "info"
    ]
    return image, [*logged, *said]


def happened(suspect: Suspect, root: Path) -> Told:
    """Inject the fault twice, without the check and with it, then take it away."""
    with opened(suspect, root, blind=True) as engine:
        right = draw(engine, MODEL)
        draw(engine, BEFORE)
        with suspect.inject(engine), suspect.blinded():
            spoiled, _ = tried(engine)
    with opened(suspect, root, blind=False) as engine:
        with suspect.inject(engine):
            found, says = tried(engine)
        after = draw(engine, MODEL)
    return Told(right, spoiled, found, says, after)


def strip(told: Told, path: Path) -> None:
    """The right picture, the spoiled one, and the one that Safelight gives, side by side."""
    images = [told.right, told.spoiled, told.found]
    sheet = PILImage.new("RGB", (SHOWN * 3 + 16, SHOWN), "white")
    for place, image in enumerate(images):
        if image is not None:
            picture = PILImage.frombytes("RGB", (image.width, image.height), image.pixels)
            sheet.paste(picture.resize((SHOWN, SHOWN), PILImage.Resampling.NEAREST), (place * (SHOWN + 8), 0))
    sheet.save(path, optimize=True)


def chapter(suspect: Suspect, told: Told, picture: str) -> list[str]:
    assert told.spoiled is not None
    apart = difference(*(_array(image) for image in (told.right, told.spoiled)))
    settings = "`canary: switch`, which is not the default" if suspect.canary else "the default settings"
    same = told.found is not None and told.found.pixels == told.right.pixels
    does = "The picture is right, pixel for pixel." if same else "No picture is given. The job fails with this error."
    return [
        f"## {suspect.title}",
        "",
        suspect.what,
        "",
        f"![{suspect.title}: right, spoiled, and what Safelight gives]({picture})",
        "",
        f"Left: the right picture. Middle: the same request with the fault and without the check ({apart}). "
        f"Right: the same request with the fault, with {settings}{'' if same else ' (none)'}.",
        "",
        suspect.rule,
        "",
        "What Safelight says:",
        "",
        *(f"    {line}" for line in told.says),
        "",
        f"What it does: {does} After the fault is taken away, the next picture is right, pixel for pixel, in the same "
        "process.",
        "",
    ]


def _array(image: Image) -> Any:
    import numpy as np

    return np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3)


def problems(suspect: Suspect, told: Told) -> list[str]:
    """What is not as the page says."""
    wrong: list[str] = []
    if told.spoiled is None or told.spoiled.pixels == told.right.pixels:
        wrong.append("the fault spoils nothing")
    if told.found is not None and told.found.pixels != told.right.pixels:
        wrong.append("a spoiled picture is given")
    if not any(line.startswith(suspect.expected) for line in told.says):
        wrong.append(f"nothing is said that begins with {suspect.expected!r}")
    if told.after.pixels != told.right.pixels:
        wrong.append("the next picture is spoiled")
    return [f"{suspect.name}: {what}" for what in wrong]


HEADING = """# The story

Users of a well-known image generator switched between a few checkpoints, and every image turned to noise until a
restart. Four suspects were named, and nobody found the cause. On this page each suspect is injected into the running
program. `make story` writes this page and its pictures.

One model draws, a second one is used, the fault is injected, and the first one draws again.
"""


def write(page: Path, suspects: Sequence[Suspect] = SUSPECTS) -> list[str]:
    """Write the page and its pictures; what is not as it says."""
    lines, wrong = [HEADING], list[str]()
    with ExitStack() as stack:
        for suspect in suspects:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            told = happened(suspect, root)
            wrong += problems(suspect, told)
            if told.spoiled is not None:
                picture = page.with_name(f"story-{suspect.name}.png")
                strip(told, picture)
                lines += chapter(suspect, told, picture.name)
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
    print(f"{given.file}: {len(wrong)} not as it says")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
