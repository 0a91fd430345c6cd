"""The doctor looks for the cause of spoiled images on this machine. It checks the usual suspects in this order:

- Loading: are the files unchanged since they were added?
- State: did the last model leave anything behind?
- Attention: does the kernel compute correctly?
- Memory: are the bytes in memory those of the files, and does the ledger match the memory?
- Device: are copies correct, and does the device repeat its results?

Findings are sentences for users; ``--json`` is for scripts.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence

from safelight.catalog.model import Model
from safelight.devices import choice, selftest
from safelight.devices.base import Device
from safelight.diagnostics.advisories import advisories
from safelight.diagnostics.canary import Canaries, has_canary
from safelight.diagnostics.finding import Finding
from safelight.diagnostics.image_checks import GROWTH, READ_AGAIN, ImageChecks
from safelight.diagnostics.remedies import suggestions
from safelight.diagnostics.report import Report, in_order
from safelight.errors import SafelightError, SettingError
from safelight.families.registry import families
from safelight.memory.account import BUFFERS
from safelight.models import attention
from safelight.pipeline import numerics
from safelight.pipeline.repair import REFERENCE
from safelight.pipeline.resources import TORCH_DTYPES, dtype_of
from safelight.workers.local_engine import LocalEngine


class Doctor:
    """Examines an engine. ``canaries``: make canaries in separate processes, and store them."""

    def __init__(self, engine: LocalEngine, canaries: Canaries) -> None:
        self.engine = engine
        self._image_checks = ImageChecks(engine, canaries)

    def since_upgrade(self, models: Sequence[Model]) -> Iterator[Finding]:
        """See :meth:`ImageChecks.since_upgrade`."""
        return self._image_checks.since_upgrade(models)

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
        yield from self._attention(models)
        yield from self._device()
        usable = [model for model in models if self.engine.library.quarantine_reason(model) is None]
        yield from self._image_checks.compare_switches([model for model in usable if has_canary(model)])
        yield self._bytes_in_memory("after these images")
        yield self._books()
        yield from advisories(self.engine.resources.run_settings)
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

    # Attention

    def _attention(self, models: Sequence[Model]) -> Iterator[Finding]:
        """Test each kernel in each dtype in which the engine or one of the models uses it."""
        settings, at = self.engine.resources.run_settings, self.engine.resources.device.torch
        used = {(settings.attention, TORCH_DTYPES[settings.dtype], settings.attention_slice_size)}
        for model in (model for model in models if model.base in families()):
            try:
                own = self.engine.resources_for(model).run_settings
            except SettingError as error:
                todo = f"Choose another kernel for it in the setting `attention_types`, for example {REFERENCE}."
                yield Finding("attention", f"the kernel of {model.name}", False, str(error), todo)
                continue
            dtype = dtype_of(own, model.family, model.family.denoiser)
            used.add((own.attention, dtype, own.attention_slice_size))
        names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
        for name, dtype, slice_size in sorted(used, key=lambda one: (one[0], names[one[1]], one[2])):
            with numerics.fixed(settings.threads, 0, at):
                tried = attention.check_kernels([name], dtype, at, slice_size)[name]
            what = f"the kernel {name} in {names[dtype]}"
            todo = (
                ""
                if tried.passed
                else f"`safelight config set attention_type {REFERENCE}`, until a fixed version is out."
            )
            yield Finding("attention", what, tried.passed, tried.why, todo)

    # Memory

    def _bytes_in_memory(self, when: str) -> Finding:
        what = f"weights in memory, {when}"
        wrong = self.engine.image_repairer.check()
        if wrong:
            return Finding("memory", what, False, f"differ from the files: {', '.join(wrong[:3])}", READ_AGAIN)
        nbytes = sum(tier.resident_bytes for tier in self.engine.tiers)
        return Finding("memory", what, True, f"{nbytes / 1e6:.0f} MB, all as in the files")

    def _books(self) -> Finding:
        what = "the ledger"
        for tier in self.engine.tiers:
            pool = tier.pool
            there = pool.used_bytes + pool.cached_bytes + pool.lingering_bytes
            # Buffers are charged where they are, but are not in the pool.
            stored = tier.ledger.stored(tier.place, besides=BUFFERS)
            if stored != there:
                evidence = f"{tier.place}: the ledger has {stored} bytes, the pool has {there}"
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
        if device.has_own_memory:
            own = self.engine.resources.residency.ledger.stored(device.name)
            allocated = device.allocated()
            if allocated is not None and abs(allocated - own) > GROWTH:
                evidence = f"{device.name} has {allocated} bytes in use, the ledger has {own}"
                todo = "Restart Safelight. Another program may use the device."
                return Finding("memory", what, False, evidence, todo)
        return Finding("memory", what, True, "it accounts for every byte of weights, and is within the budget")

    # Device

    def _device(self) -> Iterator[Finding]:
        device = self.engine.resources.device
        yield self._arithmetic(device)
        if not device.has_own_memory:
            return
        before = device.asynchronous
        seen = selftest.run_test(device)
        device.asynchronous = before and seen.asynchronous
        trusted = seen.asynchronous or not before
        todo = "" if trusted else "Nothing: from now on Safelight copies synchronously to this device."
        yield Finding("device", f"copies to {device.name}", trusted, seen.why, todo)

    def _arithmetic(self, device: Device) -> Finding:
        settings = self.engine.resources.run_settings
        what = f"{settings.dtype} on {settings.device}"
        if settings.dtype != "fp32" and not choice.computes_correctly(settings.dtype, device.torch):
            evidence = "a matrix product differs from float64 by more than rounding"
            return Finding("device", what, False, evidence, "`safelight config set precision fp32`")
        return Finding("device", what, True, "a matrix product differs from float64 only by rounding")

    def machine(self) -> dict[str, str]:
        """Return a description of the machine, its settings and its library versions."""
        settings = self.engine.resources.run_settings
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
