"""The doctor's checks that make images: does a switch, an adapter or an upgrade change what a model makes?

An image that differs from the one of a fresh process has a cause: the checks find out which suspect it is.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace

from safelight.catalog.model import Model
from safelight.devices import machine
from safelight.diagnostics import combinations
from safelight.diagnostics.canary import Canaries, Canary, has_canary, pixels_of, request
from safelight.diagnostics.finding import Finding, Suspect
from safelight.diagnostics.image_difference import Difference, difference
from safelight.diagnostics.report import A_THEN_A, ADAPTED, GROWN, SWITCHED
from safelight.errors import SafelightError
from safelight.pipeline import run
from safelight.pipeline.repair import REFERENCE
from safelight.pipeline.resources import without_text_cache
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


class ImageChecks:
    """Makes images by an engine, and compares them.

    ``canaries``: make canaries in separate processes, and store them.
    """

    def __init__(self, engine: LocalEngine, canaries: Canaries) -> None:
        self.engine = engine
        self._canaries = canaries
        self._device_variation: Difference | None = None

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
                self._canaries.make_in_fresh_process(model)
            if not earlier:
                yield Finding("device", what, True, "there is no canary from an earlier version; one is stored now")
                continue
            yield _upgraded(what, earlier[-1], image)

    def compare_switches(self, models: list[Model]) -> Iterator[Finding]:
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
            yield from self._check_adapters_leave_no_trace(model, image)
        before = machine.anonymous_bytes() - self._stored_bytes()
        for model in [*there, *reversed(there[:-1])]:
            yield self._against_fresh(model)
        for _ in range(max(0, ROUNDS - 2 * len(there) + 1)):
            for model in there[:2]:
                self._image(model)
        gc.collect()
        grown = machine.anonymous_bytes() - self._stored_bytes() - before
        evidence = f"{grown / 1e6:+.0f} MB in addition to the models after {max(ROUNDS, 2 * len(there) - 1)} switches"
        ok = grown < GROWTH
        yield Finding("memory", GROWN, ok, evidence, "" if ok else "`safelight doctor --soak 2000` measures it.")

    def _check_adapters_leave_no_trace(self, model: Model, plain: Image) -> Iterator[Finding]:
        """Make images with adapters that fit the model, and then without them again."""
        combined = [
            loras for loras in combinations.list_combinations(self.engine, model, request(model).prompt) if loras
        ]
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
        if not same and self._device_variation is not None:
            similar = difference(pixels_of(plain), pixels_of(image)).similarity
            same = similar >= min(self._device_variation.similarity, ROUNDING)
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
        self._device_variation = image_difference = difference(pixels_of(first), pixels_of(again))
        ok = image_difference.similarity >= ROUNDING
        evidence = f"{model.name} twice: not the same, {image_difference}" + (
            "; comparisons allow this difference" if ok else ""
        )
        todo = "" if ok else "Run `safelight --device cpu doctor` to see whether the device is at fault."
        return Finding("device", A_THEN_A, ok, evidence, todo)

    def _against_fresh(self, model: Model) -> Finding:
        def make(asked: Request) -> Image:
            return next(self._generated(asked))

        try:
            image_difference = self._canaries.compare(model, make)
        except (SafelightError, RuntimeError) as error:
            return Finding("state", SWITCHED, False, f"{model.name}: {error}", "See the other findings.")
        if image_difference is None:
            return Finding("state", SWITCHED, True, f"{model.name}: the same as in a process that held no other model")
        if self._device_variation is not None and image_difference.similarity >= min(
            self._device_variation.similarity, ROUNDING
        ):
            return Finding(
                "state", SWITCHED, True, f"{model.name}: within this device's own variation, {image_difference}"
            )
        suspect, todo = self._explained(model)
        return Finding(suspect, SWITCHED, False, f"{model.name}: {image_difference}", todo)

    def _generated(self, asked: Request) -> Iterator[Image]:
        """Generate images without the cache of text-encoder outputs, so that everything is computed."""
        self.engine.resources.embedding_cache.clear()
        return self.engine.generate(asked)

    def _image(self, model: Model) -> tuple[Image | None, str]:
        """Return (image, ""), or (None, why it failed)."""
        try:
            return next(self._generated(request(model))), ""
        except (SafelightError, RuntimeError) as error:
            return None, str(error)

    def _explained(self, model: Model) -> tuple[Suspect, str]:
        """Return (suspect, what to do) for an image that differs. The step that fixes it identifies the suspect."""
        if self.engine.image_repairer.check(model):
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
            resources = self.engine.resources_for(model)
            with_reference = replace(resources, run_settings=replace(resources.run_settings, attention=REFERENCE))
            reference = run.make_image(
                Contents.plain(request(model), model), model, without_text_cache(with_reference), 0, lambda _: None
            )
            if difference(pixels_of(image), pixels_of(reference)).similarity < ROUNDING:
                return "attention", f"`safelight config set attention_type {REFERENCE}`"
        return "state", "Restart Safelight, and report it with `safelight doctor --save FILE`."

    def _stored_bytes(self) -> int:
        return sum(tier.ledger.stored(tier.place) for tier in self.engine.tiers if tier.place == "host")


def _upgraded(what: str, before: Canary, image: Image) -> Finding:
    run = image.metadata["run"]
    old = {**before.run, **before.run["versions"]}
    new = {**run, **run["versions"]}
    changed = [
        f"{name} {old.get(name)} to {new[name]}" for name in new if name != "versions" and old.get(name) != new[name]
    ]
    since = ", ".join(changed)
    if before.pixels_sha256 == image.pixels_sha256:
        return Finding("device", what, True, f"unchanged since the upgrade ({since})")
    image_difference = difference(before.pixels(), pixels_of(image))
    ok = image_difference.similarity >= ROUNDING
    evidence = f"since {since}: {image_difference}" + ("; this is only rounding" if ok else "")
    return Finding(
        "device", what, ok, evidence, "" if ok else "Run `safelight rollback` to return to the earlier versions."
    )
