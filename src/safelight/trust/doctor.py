"""The doctor: looks for what spoils images on this machine, in the order of the usual suspects, with evidence.

Loading: are the files what was added? State: is anything left of the last model? Attention: does the kernel compute
rightly? Memory: are the bytes in memory those that were read, and are the books right? Device: can its copies be
trusted, and does it repeat itself? Whoever has never heard of any of this reads the sentences; `--json` is for scripts.
"""

from __future__ import annotations

import gc
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from safelight.arch import attention
from safelight.devices import choice, machine, selftest
from safelight.devices.base import Device
from safelight.engine.local import LocalEngine
from safelight.engine.repair import REFERENCE
from safelight.errors import SafelightError
from safelight.generate import run
from safelight.generate.bench import TORCH_DTYPES, computing_all
from safelight.library.chosen import Settled
from safelight.library.model import Model
from safelight.request.results import Image
from safelight.request.schema import Request
from safelight.trust import combinations
from safelight.trust.advisories import advisories
from safelight.trust.canary import Canaries, Canary, pixels_of, request
from safelight.trust.difference import Difference, difference
from safelight.trust.finding import Finding, Suspect
from safelight.trust.remedies import suggestions
from safelight.trust.report import A_THEN_A, ADAPTED, GROWN, SWITCHED, Report, in_order

ROUNDS = 4
"""Switches over which memory is watched."""

GROWTH = 64 << 20
"""Bytes that the process may grow beside its ledger."""

ROUNDING = 0.9
"""Structural similarity of two images that differ by rounding: more."""

READ_AGAIN = "Nothing: it was dropped and is read again. If it happens again, test this machine's memory (memtest86+)."


class Doctor:
    """Examines an engine. ``canaries`` make and keep canaries, in processes of their own."""

    def __init__(self, engine: LocalEngine, canaries: Canaries) -> None:
        self.engine = engine
        self._canaries = canaries
        self._spread: Difference | None = None

    def since_upgrade(self, models: Sequence[Model]) -> Iterator[Finding]:
        """For each model, whether its canary is that of the last other versions, and if not how far it is from it."""
        for model in models:
            image, problem = self._made(model)
            what = f"the canary of {model.name}"
            if image is None:
                yield Finding("loading", what, False, problem, "`safelight doctor` looks for the cause.")
                continue
            run = image.metadata["run"]
            earlier = [canary for canary in self._canaries.history(model) if dict(canary.run) != dict(run)]
            if self._canaries.known(model, run) is None:
                self._canaries.made_fresh(model)
            if not earlier:
                yield Finding("device", what, True, "no earlier versions made one; from now on there is one to compare")
                continue
            yield _upgraded(what, earlier[-1], image)

    def examine(self, models: Sequence[Model], on_finding: Callable[[Finding], None] = lambda _: None) -> Report:
        """Look at everything. What is in memory and what is kept between jobs is looked at before anything is made, as
        making something brings it anew. ``on_finding`` is told of each finding as it is found."""
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
        yield from self._images(usable)
        yield self._bytes_in_memory("after these images")
        yield self._books()
        yield from advisories(self.engine.bench.run)
        yield from suggestions(self.engine.library.root)

    # Loading

    def _files(self, model: Model) -> Finding:
        what = f"the files of {model.name}"
        try:
            self.engine.library.verify(model.name)
        except SafelightError as error:
            todo = f"Get it again, then `safelight models verify {model.name}`, or add it again if it was meant."
            return Finding("loading", what, False, str(error), todo)
        size = sum(t.nbytes for c in model.manifest.components for t in c.tensors)
        return Finding("loading", what, True, f"{size / 1e6:.0f} MB read, every tensor as it was added")

    def _adapters(self) -> Iterator[Finding]:
        """The files of those that the user has; those that came along are part of the installation."""
        for adapter in self.engine.shelves.adapters.all():
            if adapter.origin != "added":
                continue
            what = f"the file of the adapter {adapter.name}"
            try:
                self.engine.shelves.adapters.verify(adapter)
            except SafelightError as error:
                todo = "Get it again, and add it again with `safelight adapters add`."
                yield Finding("loading", what, False, str(error), todo)
            else:
                yield Finding("loading", what, True, "every tensor as it was added")

    # State

    def _skeletons(self) -> Finding:
        what = "models between two images"
        changed = self.engine.bench.skeletons.check()
        if changed:
            todo = "Nothing: they were dropped. Look for what keeps a reference to a model (an extension, a hook)."
            return Finding("state", what, False, f"something was left on them: {'; '.join(changed[:3])}", todo)
        return Finding("state", what, True, "every kept one is as it was built: no hook, no processor, no flag")

    def _images(self, models: list[Model]) -> Iterator[Finding]:
        """A then A; then each model after each other one; against fresh processes."""
        there: list[Model] = []
        for model in models:
            image, problem = self._made(model)
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
                self._made(model)
        gc.collect()
        grown = machine.anonymous_bytes() - self._stored() - before
        evidence = f"{grown / 1e6:+.0f} MB beside the models' own after {max(ROUNDS, 2 * len(there) - 1)} switches"
        ok = grown < GROWTH
        yield Finding("memory", GROWN, ok, evidence, "" if ok else "`safelight doctor --soak 2000` measures it.")

    def _put_on_and_off(self, model: Model, plain: Image) -> Iterator[Finding]:
        """The model under adapters that fit it, and alone again."""
        combined = [loras for loras in combinations.over(self.engine, model, request(model).prompt) if loras]
        if not combined:
            return
        try:
            for loras in combined:
                next(self._generated(replace(request(model), loras=loras)))
        except (SafelightError, RuntimeError) as error:
            todo = "`safelight adapters verify` looks at their files."
            yield Finding("state", ADAPTED, False, f"{model.name}: {error}", todo)
            return
        image, problem = self._made(model)
        if image is None:
            yield Finding("state", ADAPTED, False, f"{model.name}: {problem}", "See the other findings.")
            return
        same = image.pixels_sha256 == plain.pixels_sha256
        if not same and self._spread is not None:
            similar = difference(pixels_of(plain), pixels_of(image)).similarity
            same = similar >= min(self._spread.similarity, ROUNDING)
        evidence = f"{model.name}: after {len(combined)} combinations it draws {'as before' if same else 'otherwise'}"
        todo = "" if same else "Start again, and report it with `safelight doctor --save FILE`."
        yield Finding("state", ADAPTED, same, evidence, todo)

    def _twice(self, model: Model, first: Image) -> Finding:
        """Whether the device repeats itself; its spread is what comparisons allow from now on."""
        again, problem = self._made(model)
        if again is None:
            return Finding("state", A_THEN_A, False, problem, "See the other findings.")
        if again.pixels_sha256 == first.pixels_sha256:
            return Finding("device", A_THEN_A, True, f"{model.name} twice: the same")
        self._spread = apart = difference(pixels_of(first), pixels_of(again))
        ok = apart.similarity >= ROUNDING
        evidence = f"{model.name} twice: not the same, {apart}" + ("; comparisons allow as much" if ok else "")
        return Finding(
            "device", A_THEN_A, ok, evidence, "" if ok else "`safelight --device cpu doctor` shows whose fault it is."
        )

    def _against_fresh(self, model: Model) -> Finding:
        def make(asked: Request) -> Image:
            return next(self._generated(asked))

        try:
            apart = self._canaries.compare(model, make)
        except (SafelightError, RuntimeError) as error:
            return Finding("state", SWITCHED, False, f"{model.name}: {error}", "See the other findings.")
        if apart is None:
            return Finding("state", SWITCHED, True, f"{model.name}: as in a process that has held no other model")
        if self._spread is not None and apart.similarity >= min(self._spread.similarity, ROUNDING):
            return Finding("state", SWITCHED, True, f"{model.name}: within this device's own spread, {apart}")
        suspect, todo = self._explained(model)
        return Finding(suspect, SWITCHED, False, f"{model.name}: {apart}", todo)

    def _generated(self, asked: Request) -> Iterator[Image]:
        """Everything computed: what text encoders made before is not used."""
        self.engine.bench.conditionings.clear()
        return self.engine.generate(asked)

    def _made(self, model: Model) -> tuple[Image | None, str]:
        try:
            return next(self._generated(request(model))), ""
        except (SafelightError, RuntimeError) as error:
            return None, str(error)

    def _explained(self, model: Model) -> tuple[Suspect, str]:
        """Which suspect an image that differs points to, by what makes it right again."""
        if self.engine.repairs.check(model):
            return "memory", READ_AGAIN
        known = {str(canary.run["attention"]): canary for canary in self._canaries.history(model)}
        self.engine.unload(model.digest)
        image, _ = self._made(model)
        if image is None:
            return "state", "Start again, and report it with `safelight doctor --save FILE`."
        now = known.get(image.metadata["run"]["attention"])
        if now is not None and now.pixels_sha256 == image.pixels_sha256:
            return "loading", "Nothing: it was read again. If it happens again, report it with `--save`."
        if image.metadata["run"]["attention"] != REFERENCE:
            bench = self.engine.bench_for(model)
            with_reference = replace(bench, run=replace(bench.run, attention=REFERENCE))
            reference = run.image(Settled(request(model)), model, computing_all(with_reference), 0, lambda _: None)
            if difference(pixels_of(image), pixels_of(reference)).similarity < ROUNDING:
                return "attention", f"`safelight config set attention_type {REFERENCE}`"
        return "state", "Start again, and report it with `safelight doctor --save FILE`."

    # Attention

    def _attention(self) -> Iterator[Finding]:
        settings = self.engine.bench.run
        dtype, at = TORCH_DTYPES[settings.dtype], self.engine.bench.device.torch
        name = settings.attention
        tried = attention.try_out([name], dtype, at, settings.attention_slice_size)[name]
        what = f"the kernel {name} in {settings.dtype}"
        todo = (
            "" if tried.passed else f"`safelight config set attention_type {REFERENCE}`, until another version is out."
        )
        yield Finding("attention", what, tried.passed, tried.why, todo)

    # Memory

    def _bytes_in_memory(self, when: str) -> Finding:
        what = f"weights in memory, {when}"
        wrong = self.engine.repairs.check()
        if wrong:
            return Finding("memory", what, False, f"not what was read: {', '.join(wrong[:3])}", READ_AGAIN)
        nbytes = sum(tier.resident_bytes for tier in self.engine.tiers)
        return Finding("memory", what, True, f"{nbytes / 1e6:.0f} MB, all as they were read")

    def _books(self) -> Finding:
        what = "the ledger"
        for tier in self.engine.tiers:
            pool = tier.pool
            there = pool.used_bytes + pool.kept_bytes + pool.lingering_bytes
            if tier.ledger.stored(tier.place) != there:
                evidence = f"{tier.place}: {tier.ledger.stored(tier.place)} bytes are noted, {there} are there"
                return Finding("memory", what, False, evidence, "Start again, and report it with `--save FILE`.")
            if pool.lingering_bytes:
                evidence = (
                    f"{tier.place}: somebody keeps {pool.lingering_bytes / 1e6:.1f} MB of weights that were dropped"
                )
                return Finding("memory", what, False, evidence, "Look for what keeps a reference to a model.")
            over = tier.ledger.stored(tier.place) + tier.ledger.reserved(tier.place) - tier.ledger.budget(tier.place)
            if over > 0:
                evidence = f"{tier.place}: {over / 1e6:.1f} MB over its budget"
                return Finding("memory", what, False, evidence, "Close what else uses this memory, or start again.")
        device = self.engine.bench.device
        if device.separate:
            own = self.engine.bench.residency.ledger.stored(device.name)
            told = device.allocated()
            if told is not None and abs(told - own) > GROWTH:
                evidence = f"{device.name} has {told} bytes in use, {own} are noted"
                return Finding("memory", what, False, evidence, "Start again; another program may use the device.")
        return Finding("memory", what, True, "every byte of weights is noted, and none is over the budget")

    def _stored(self) -> int:
        return sum(tier.ledger.stored(tier.place) for tier in self.engine.tiers if tier.place == "host")

    # Device

    def _device(self) -> Iterator[Finding]:
        device = self.engine.bench.device
        yield self._arithmetic(device)
        if not device.separate:
            return
        before = device.asynchronous
        seen = selftest.tried(device)
        device.asynchronous = before and seen.asynchronous
        trusted = seen.asynchronous or not before
        todo = "" if trusted else "Nothing: from now on copies wait for each other on this device."
        yield Finding("device", f"copies to {device.name}", trusted, seen.why, todo)

    def _arithmetic(self, device: Device) -> Finding:
        settings = self.engine.bench.run
        what = f"{settings.dtype} on {settings.device}"
        if settings.dtype != "fp32" and not choice.computes(settings.dtype, device.torch):
            evidence = "a product of matrices is further from float64 than rounding makes it"
            return Finding("device", what, False, evidence, "`safelight config set precision fp32`")
        return Finding("device", what, True, "a product of matrices is as near to float64 as rounding lets it be")

    def machine(self) -> dict[str, str]:
        """What computes, and with which versions."""
        settings = self.engine.bench.run
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
    evidence = f"since {since}: {apart}" + ("; that is rounding" if ok else "")
    return Finding(
        "device", what, ok, evidence, "" if ok else "`safelight rollback` goes back to the earlier versions."
    )
