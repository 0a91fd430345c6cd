"""The doctor looks for the cause of spoiled images on this machine. It checks the usual suspects in this order:

- Loading: are the files unchanged since they were added?
- State: did the last model leave anything behind?
- Attention: does the kernel compute correctly?
- Memory: are the bytes in memory those of the files, and does the ledger match the memory?
- Device: are copies correct, and does the device repeat its results?

Findings are sentences for users; ``--json`` is for scripts.
"""

from __future__ import annotations

import gc
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from safelight.catalog.model import Model
from safelight.devices import choice, machine, selftest
from safelight.devices.base import Device
from safelight.diagnostics import combinations
from safelight.diagnostics.advisories import advisories
from safelight.diagnostics.canary import Canaries, Canary, has_canary, pixels_of, request
from safelight.diagnostics.finding import Finding, Suspect
from safelight.diagnostics.image_difference import Difference, difference
from safelight.diagnostics.remedies import suggestions
from safelight.diagnostics.report import A_THEN_A, ADAPTED, GROWN, SWITCHED, Report, in_order
from safelight.errors import SafelightError
from safelight.models import attention
from safelight.pipeline import run
from safelight.pipeline.repair import REFERENCE
from safelight.pipeline.resources import TORCH_DTYPES, computing_all
from safelight.request.results import Image
from safelight.request.schema import Request
from safelight.resolve.contents import Contents
from safelight.workers.local_engine import LocalEngine

ROUNDS = 4
"""Number of switches during which memory is measured."""

GROWTH = 64 << 20
"""Bytes by which the process may grow in addition to its ledger."""

ROUNDING = 0.9
"""Two images with a structural similarity above this differ only by rounding."""

READ_AGAIN = "Nothing: Safelight reads it again. If it happens again, test this machine's memory (memtest86+)."


class Doctor:
    """Examines an engine. ``canaries``: make canaries in separate processes, and store them."""

    def __init__(self, engine: LocalEngine, canaries: Canaries) -> None:
        self.engine = engine
        self._canaries = canaries
        self._spread: Difference | None = None

    def since_upgrade(self, models: Sequence[Model]) -> Iterator[Finding]:
        """Yield for each model whether its canary equals the one of the previous versions, or how much it differs."""
        for model in filter(has_canary, models):
            image, problem = self._image(model)
            what = f"the canary of {model.name}"
            if image is None:
                yield Finding("loading", what, False, problem, "Run `safelight doctor` to find the cause.")
                continue
            run = image.metadata["run"]
            earlier = [canary for canary in self._canaries.history(model) if dict(canary.run) != dict(run)]
            if self._canaries.known(model, run) is None:
                self._canaries.made_fresh(model)
            if not earlier:
                yield Finding("device", what, True, "earlier versions made none; from now on there is one to compare")
                continue
            yield _upgraded(what, earlier[-1], image)

    def examine(self, models: Sequence[Model], on_finding: Callable[[Finding], None] = lambda _: None) -> Report:
        """Check everything.

        Memory and the state between jobs come first, because making an image would load them again.
        ``on_finding``: called with each finding.
        """
        found: list[Finding] = []
        for finding in self._all(list(models)):
            found.append(finding)
            on_finding(finding)
        return Report(in_order(found), self.machine())

    def _all(self, models: list[Model]) -> Iterator[Finding]:
        yield self._bytes_in_memory("as it is now")
        yield self._skeletons()
        for model in models:
            yield self._files(model)
        yield from self._adapters()
        yield from self._attention()
        yield from self._device()
        usable = [model for model in models if self.engine.library.quarantined(model) is None]
        yield from self._images([model for model in usable if has_canary(model)])
        yield self._bytes_in_memory("after these images")
        yield self._books()
        yield from advisories(self.engine.resources.run)
        yield from suggestions(self.engine.library.root)

    # Loading

    def _files(self, model: Model) -> Finding:
        what = f"the files of {model.name}"
        try:
            self.engine.library.verify(model.name)
        except SafelightError as error:
            todo = f"Download it again and run `safelight models verify {model.name}`. If you changed it, add it again."
            return Finding("loading", what, False, str(error), todo)
        size = sum(t.nbytes for c in model.manifest.components for t in c.tensors)
        return Finding("loading", what, True, f"{size / 1e6:.0f} MB read, every tensor is unchanged")

    def _adapters(self) -> Iterator[Finding]:
        """Check the files of the user's own adapters. The starters' are part of the installation."""
        for adapter in self.engine.catalog.adapters.all():
            if adapter.origin != "added":
                continue
            what = f"the file of the adapter {adapter.name}"
            try:
                self.engine.catalog.adapters.verify(adapter)
            except SafelightError as error:
                todo = "Download it again, and add it again with `safelight adapters add`."
                yield Finding("loading", what, False, str(error), todo)
            else:
                yield Finding("loading", what, True, "every tensor is unchanged")

    # State

    def _skeletons(self) -> Finding:
        what = "models between two images"
        changed = self.engine.resources.skeletons.check()
        if changed:
            todo = "Nothing: Safelight dropped them. Look for an extension or a hook that holds a reference to a model."
            return Finding("state", what, False, f"they were changed: {'; '.join(changed[:3])}", todo)
        return Finding("state", what, True, "every cached model is unchanged: no hook, no processor, no flag")

    def _images(self, models: list[Model]) -> Iterator[Finding]:
        """Make images by one model twice, then by each model after another, and compare with fresh processes."""
        there: list[Model] = []
        for model in models:
            image, problem = self._image(model)
            if image is None:
                yield Finding("state", f"an image by {model.name}", False, problem, "See the other findings.")
                continue
            there.append(model)
            if len(there) == 1:
                yield self._twice(model, image)
            yield from self._put_on_and_off(model, image)
        before = machine.anonymous_bytes() - self._stored()
        for model in [*there, *reversed(there[:-1])]:
            yield self._against_fresh(model)
        for _ in range(max(0, ROUNDS - 2 * len(there) + 1)):
            for model in there[:2]:
                self._image(model)
        gc.collect()
        grown = machine.anonymous_bytes() - self._stored() - before
        evidence = f"{grown / 1e6:+.0f} MB in addition to the models after {max(ROUNDS, 2 * len(there) - 1)} switches"
        ok = grown < GROWTH
        yield Finding("memory", GROWN, ok, evidence, "" if ok else "`safelight doctor --soak 2000` measures it.")

    def _put_on_and_off(self, model: Model, plain: Image) -> Iterator[Finding]:
        """Make images with adapters that fit the model, and then without them again."""
        combined = [loras for loras in combinations.over(self.engine, model, request(model).prompt) if loras]
        if not combined:
            return
        try:
            for loras in combined:
                next(self._generated(replace(request(model), loras=loras)))
        except (SafelightError, RuntimeError) as error:
            todo = "Run `safelight adapters verify` to check their files."
            yield Finding("state", ADAPTED, False, f"{model.name}: {error}", todo)
            return
        image, problem = self._image(model)
        if image is None:
            yield Finding("state", ADAPTED, False, f"{model.name}: {problem}", "See the other findings.")
            return
        same = image.pixels_sha256 == plain.pixels_sha256
        if not same and self._spread is not None:
            similar = difference(pixels_of(plain), pixels_of(image)).similarity
            same = similar >= min(self._spread.similarity, ROUNDING)
        result = "the same image as before" if same else "another image"
        evidence = f"{model.name}: after {len(combined)} combinations it makes {result}"
        todo = "" if same else "Restart Safelight, and report it with `safelight doctor --save FILE`."
        yield Finding("state", ADAPTED, same, evidence, todo)

    def _twice(self, model: Model, first: Image) -> Finding:
        """Check whether the device repeats its results. Later comparisons allow the difference found here."""
        again, problem = self._image(model)
        if again is None:
            return Finding("state", A_THEN_A, False, problem, "See the other findings.")
        if again.pixels_sha256 == first.pixels_sha256:
            return Finding("device", A_THEN_A, True, f"{model.name} twice: the same")
        self._spread = apart = difference(pixels_of(first), pixels_of(again))
        ok = apart.similarity >= ROUNDING
        evidence = f"{model.name} twice: not the same, {apart}" + ("; comparisons allow this difference" if ok else "")
        todo = "" if ok else "Run `safelight --device cpu doctor` to see whether the device is at fault."
        return Finding("device", A_THEN_A, ok, evidence, todo)

    def _against_fresh(self, model: Model) -> Finding:
        def make(asked: Request) -> Image:
            return next(self._generated(asked))

        try:
            apart = self._canaries.compare(model, make)
        except (SafelightError, RuntimeError) as error:
            return Finding("state", SWITCHED, False, f"{model.name}: {error}", "See the other findings.")
        if apart is None:
            return Finding("state", SWITCHED, True, f"{model.name}: the same as in a process that held no other model")
        if self._spread is not None and apart.similarity >= min(self._spread.similarity, ROUNDING):
            return Finding("state", SWITCHED, True, f"{model.name}: within this device's own variation, {apart}")
        suspect, todo = self._explained(model)
        return Finding(suspect, SWITCHED, False, f"{model.name}: {apart}", todo)

    def _generated(self, asked: Request) -> Iterator[Image]:
        """Generate images without the cache of text-encoder outputs, so that everything is computed."""
        self.engine.resources.conditionings.clear()
        return self.engine.generate(asked)

    def _image(self, model: Model) -> tuple[Image | None, str]:
        """Return (image, ""), or (None, why it failed)."""
        try:
            return next(self._generated(request(model))), ""
        except (SafelightError, RuntimeError) as error:
            return None, str(error)

    def _explained(self, model: Model) -> tuple[Suspect, str]:
        """Return (suspect, what to do) for an image that differs. What repairs the image tells the suspect."""
        if self.engine.repairs.check(model):
            return "memory", READ_AGAIN
        known = {str(canary.run["attention"]): canary for canary in self._canaries.history(model)}
        self.engine.loaded.unload(model.digest)
        image, _ = self._image(model)
        if image is None:
            return "state", "Restart Safelight, and report it with `safelight doctor --save FILE`."
        now = known.get(image.metadata["run"]["attention"])
        if now is not None and now.pixels_sha256 == image.pixels_sha256:
            return "loading", "Nothing: Safelight read it again. If it happens again, report it with `--save`."
        if image.metadata["run"]["attention"] != REFERENCE:
            resources = self.engine.bench_for(model)
            with_reference = replace(resources, run=replace(resources.run, attention=REFERENCE))
            reference = run.image(
                Contents.plain(request(model), model), model, computing_all(with_reference), 0, lambda _: None
            )
            if difference(pixels_of(image), pixels_of(reference)).similarity < ROUNDING:
                return "attention", f"`safelight config set attention_type {REFERENCE}`"
        return "state", "Restart Safelight, and report it with `safelight doctor --save FILE`."

    # Attention

    def _attention(self) -> Iterator[Finding]:
        settings = self.engine.resources.run
        dtype, at = TORCH_DTYPES[settings.dtype], self.engine.resources.device.torch
        name = settings.attention
        tried = attention.try_out([name], dtype, at, settings.attention_slice_size)[name]
        what = f"the kernel {name} in {settings.dtype}"
        todo = (
            "" if tried.passed else f"`safelight config set attention_type {REFERENCE}`, until a fixed version is out."
        )
        yield Finding("attention", what, tried.passed, tried.why, todo)

    # Memory

    def _bytes_in_memory(self, when: str) -> Finding:
        what = f"weights in memory, {when}"
        wrong = self.engine.repairs.check()
        if wrong:
            return Finding("memory", what, False, f"differ from the files: {', '.join(wrong[:3])}", READ_AGAIN)
        nbytes = sum(tier.resident_bytes for tier in self.engine.tiers)
        return Finding("memory", what, True, f"{nbytes / 1e6:.0f} MB, all as in the files")

    def _books(self) -> Finding:
        what = "the ledger"
        for tier in self.engine.tiers:
            pool = tier.pool
            there = pool.used_bytes + pool.kept_bytes + pool.lingering_bytes
            if tier.ledger.stored(tier.place) != there:
                evidence = f"{tier.place}: the ledger has {tier.ledger.stored(tier.place)} bytes, the pool has {there}"
                return Finding("memory", what, False, evidence, "Restart Safelight, and report it with `--save FILE`.")
            if pool.lingering_bytes:
                evidence = f"{tier.place}: something still holds {pool.lingering_bytes / 1e6:.1f} MB of evicted weights"
                return Finding("memory", what, False, evidence, "Look for code that holds a reference to a model.")
            over = tier.ledger.stored(tier.place) + tier.ledger.reserved(tier.place) - tier.ledger.budget(tier.place)
            if over > 0:
                evidence = f"{tier.place}: {over / 1e6:.1f} MB over its budget"
                todo = "Close other programs that use this memory, or restart Safelight."
                return Finding("memory", what, False, evidence, todo)
        device = self.engine.resources.device
        if device.separate:
            own = self.engine.resources.residency.ledger.stored(device.name)
            allocated = device.allocated()
            if allocated is not None and abs(allocated - own) > GROWTH:
                evidence = f"{device.name} has {allocated} bytes in use, the ledger has {own}"
                todo = "Restart Safelight. Another program may use the device."
                return Finding("memory", what, False, evidence, todo)
        return Finding("memory", what, True, "it has every byte of weights, and is within the budget")

    def _stored(self) -> int:
        return sum(tier.ledger.stored(tier.place) for tier in self.engine.tiers if tier.place == "host")

    # Device

    def _device(self) -> Iterator[Finding]:
        device = self.engine.resources.device
        yield self._arithmetic(device)
        if not device.separate:
            return
        before = device.asynchronous
        seen = selftest.tried(device)
        device.asynchronous = before and seen.asynchronous
        trusted = seen.asynchronous or not before
        todo = "" if trusted else "Nothing: from now on Safelight copies synchronously to this device."
        yield Finding("device", f"copies to {device.name}", trusted, seen.why, todo)

    def _arithmetic(self, device: Device) -> Finding:
        settings = self.engine.resources.run
        what = f"{settings.dtype} on {settings.device}"
        if settings.dtype != "fp32" and not choice.computes(settings.dtype, device.torch):
            evidence = "a matrix product differs from float64 by more than rounding"
            return Finding("device", what, False, evidence, "`safelight config set precision fp32`")
        return Finding("device", what, True, "a matrix product differs from float64 only by rounding")

    def machine(self) -> dict[str, str]:
        """Return a description of the machine, its settings and its library versions."""
        settings = self.engine.resources.run
        return {
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "python": platform.python_version(),
            "device": settings.device,
            "hardware": settings.hardware,
            "dtype": settings.dtype,
            "attention": settings.attention,
            "threads": str(settings.threads),
            **{name: str(version) for name, version in settings.versions.items()},
        }


def _upgraded(what: str, before: Canary, image: Image) -> Finding:
    run = image.metadata["run"]
    old = {**before.run, **before.run["versions"]}
    new = {**run, **run["versions"]}
    changed = [
        f"{name} {old.get(name)} to {new[name]}" for name in new if name != "versions" and old.get(name) != new[name]
    ]
    since = ", ".join(changed)
    if before.pixels_sha256 == image.pixels_sha256:
        return Finding("device", what, True, f"the same as before {since}")
    apart = difference(before.pixels(), pixels_of(image))
    ok = apart.similarity >= ROUNDING
    evidence = f"since {since}: {apart}" + ("; this is only rounding" if ok else "")
    return Finding(
        "device", what, ok, evidence, "" if ok else "Run `safelight rollback` to return to the earlier versions."
    )
