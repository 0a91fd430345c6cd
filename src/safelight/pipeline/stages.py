"""A stage: components are leased and bound, something is computed with them, and what failed is tried again.

When memory runs out: leave the handler, let go of its frames, drop what nobody holds, promise more to computing. When
weights turn out to be spoiled, they are read again; when something was left on a module, one is built anew.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import structlog
import torch
from torch import nn

from safelight.catalog.model import Model
from safelight.devices import machine
from safelight.devices.failures import translate_memory_errors
from safelight.errors import IntegrityError, OutOfMemoryError, StateLeftError, shortened
from safelight.families.family import CONTROLNET
from safelight.memory.lease import Lease, Use
from safelight.memory.segments import component_key
from safelight.memory.working_memory import Work, watched
from safelight.models.bind import bound
from safelight.models.skeleton import SkeletonKey
from safelight.pipeline import workload
from safelight.pipeline.resources import Resources, dtype_of
from safelight.request.results import Repair, Seconds
from safelight.request.run_settings import RunSettings
from safelight.weights.manifest import ComponentManifest
from safelight.weights.overlay import Adapted

_log = structlog.get_logger(__name__)

Result = TypeVar("Result")

ATTEMPTS = 3
"""Of a stage, when memory runs out or weights were spoiled."""


class Clock:
    """Adds up a stage's seconds, apart from those spent on making weights resident and binding them."""

    def __init__(self) -> None:
        self.spent = {"switch": 0.0, "encode": 0.0, "denoise": 0.0, "decode": 0.0}
        self.in_gates = 0.0

    @contextlib.contextmanager
    def stage(self, name: str) -> Generator[None]:
        """The time within is that stage's."""
        start = time.perf_counter()
        switched = self.spent["switch"]
        try:
            yield
        finally:
            self.spent[name] += time.perf_counter() - start - (self.spent["switch"] - switched)

    @contextlib.contextmanager
    def gates(self) -> Generator[None]:
        """The time within is that of gates, which is part of the stages'."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.in_gates += time.perf_counter() - start

    def seconds(self) -> Seconds:
        return Seconds(**self.spent, gates=self.in_gates)


@dataclass(frozen=True, slots=True)
class Task:
    """What a stage does. ``name``: encode, denoise, decode. ``pixels``: of what its forward ``passes`` are shown.

    ``what``: tells a component's several kinds of work. ``first``: it comes before all others of the job.
    ``seamless``: see :class:`safelight.models.skeleton.SkeletonKey`.
    """

    name: str
    pixels: int
    passes: int
    what: str = ""
    first: bool = False
    seamless: str = ""


Compute = Callable[[list[nn.Module], list[Lease]], Result]


class Stages:
    """The stages of one image by ``model``. ``clock``, ``repairs``: of the image."""

    def __init__(self, model: Model, resources: Resources, clock: Clock, repairs: list[Repair]) -> None:
        self.model = model
        self.resources = resources
        self.clock = clock
        self.repairs = repairs

    def run(
        self,
        task: Task,
        run: RunSettings,
        components: Sequence[tuple[ComponentManifest, torch.dtype]],
        compute: Compute[Result],
    ) -> Result:
        """What ``compute`` makes of the bound modules of ``components``, in their order; the first does the main work,
        the others beside it."""
        role = components[0][0].role
        for attempt in range(ATTEMPTS):
            try:
                with self.clock.stage(task.name), translate_memory_errors(f"{self.model.name}'s {role}"):
                    return self._once(task, run, components, compute)
            except OutOfMemoryError as error:
                if error.final or attempt == ATTEMPTS - 1:
                    raise
                why = let_go(error)
            except _CorruptedWeights as error:
                if attempt == ATTEMPTS - 1:
                    problem = f"{error}, in {ATTEMPTS} attempts"
                    raise IntegrityError(self.model.path, "", problem, error.remedy) from error
                why = let_go(error)
                self.repairs.append(Repair("memory", why, "read again"))
                self.resources.conditionings.clear()
            except StateLeftError as error:
                if attempt == ATTEMPTS - 1:
                    raise
                why = let_go(error)
                self.repairs.append(Repair("state", why, "computed with a newly built model"))
                self.resources.conditionings.clear()
            _log.warning("repeating a stage", stage=task.name, role=role, why=why)
            self.resources.residency.drop()
            machine.give_back()
        raise AssertionError

    def _once(
        self,
        task: Task,
        run: RunSettings,
        components: Sequence[tuple[ComponentManifest, torch.dtype]],
        compute: Compute[Result],
    ) -> Result:
        resources = replace(self.resources, run=run)
        start = time.perf_counter()
        work = work_of(components, run, task)
        uses = uses_of(self.model, resources, components, work, task)
        with contextlib.ExitStack() as held:
            leases: list[Lease] = []
            # What comes beside is leased first and leaves room for the main part, which takes what there is.
            for (component, dtype), use in reversed(list(zip(components, uses, strict=True))):
                leases.insert(0, held.enter_context(resources.residency.lease(component, dtype, use)))
            with contextlib.ExitStack() as binding:
                modules: list[nn.Module] = []
                for lease in leases:
                    key = skeleton_key(self.model, lease.component, lease.dtype, resources, task.seamless)
                    modules.append(binding.enter_context(bound(resources.skeletons, key, lease)))
                self.clock.spent["switch"] += time.perf_counter() - start
                with watched(resources.computing) as most, self._translated(work):
                    result = compute(modules, leases)
                    used = most()
                modules.clear()
            resources.verification.worked(time.perf_counter() - start)
            for lease in leases:
                self._prove(lease)
        resources.working.learn(work, used)
        machine.give_back()
        return result

    def _prove(self, lease: Lease) -> None:
        if lease.written:
            raise _CorruptedWeights(f"code wrote to the weights of the {lease.component.role}", _WRITTEN)
        verification = self.resources.verification
        # A copy that was not summed when it arrived is summed here, once, before its image is given to anybody.
        arrived = lease.unseen and verification.policy == "auto"
        if verification.due(lease.key) or arrived:
            with verification.timed():
                wrong = lease.verify()
            if wrong:
                verification.found_wrong()
                raise _CorruptedWeights(f"weights were corrupted in memory: {shortened(wrong)}", self._memory_remedy())

    def _memory_remedy(self) -> str:
        device = self.resources.device
        if device.separate:
            return f"The memory of {device.name} or its driver is unreliable; use --device cpu to work without it."
        return "Test this machine's memory, for example with memtest86+."

    @contextlib.contextmanager
    def _translated(self, work: Work) -> Generator[None]:
        try:
            with translate_memory_errors(f"Computing an image by {self.model.name}"):
                yield
        except OutOfMemoryError as error:
            # What failed to get a slab says how large; what failed within an operation does not.
            if not error.needed:
                self.resources.working.too_little(work)
            raise


def work_of(components: Sequence[tuple[ComponentManifest, torch.dtype]], run: RunSettings, task: Task) -> Work:
    """What a stage computes: by its first component, and what those beside it take."""
    (component, dtype), *beside = components
    what = task.what + (f"+{len(beside)}" if beside else "")
    work = workload.of(component, dtype, run, task.pixels, what)
    more = sum(workload.of(other, kind, run, task.pixels).guess for other, kind in beside)
    return replace(work, guess=work.guess + more)


def uses_of(
    model: Model,
    resources: Resources,
    components: Sequence[tuple[ComponentManifest, torch.dtype]],
    work: Work,
    task: Task,
) -> list[Use]:
    """How a stage uses each of its components. The last, which is leased first, promises for all what computing takes,
    and each leaves the others the least that they need."""
    roles, role = model.family.roles, components[0][0].role
    after = roles if task.first else roles[roles.index(role) + 1 :]
    rest = [component_key(model.manifest.component(r), dtype_of(resources.run, model.family, r)) for r in after]
    if model.family.denoiser in after:
        nets = [component for component in model.manifest.components if component.role == CONTROLNET]
        rest = [component_key(net, dtype_of(resources.run, model.family, CONTROLNET)) for net in nets] + rest
    upcoming = (*rest, *resources.upcoming)
    keys = [component_key(component, dtype) for component, dtype in components]
    promised = resources.working.estimate(work) if resources.promised is None else resources.promised
    # What lies over weights is computed before they are used, never at the same time.
    promised = max(promised, *(c.working if isinstance(c, Adapted) else 0 for c, _ in components))
    least = [resources.residency.planner.least(component, dtype) for component, dtype in components]
    last = len(components) - 1
    return [
        Use(task.passes, promised if place == last else 0, (*keys[:place], *upcoming), sum(least[:place]))
        for place in range(last + 1)
    ]


def skeleton_key(
    model: Model, component: ComponentManifest, dtype: torch.dtype, resources: Resources, seamless: str
) -> SkeletonKey:
    """Of the skeleton to which a component is bound."""
    run, at = resources.run, resources.device.torch
    axes = "" if component.role in model.family.text_encoders else seamless
    return SkeletonKey(
        model.base, component.role, component.config, dtype, run.attention, at, run.attention_slice_size, axes
    )


def let_go(error: BaseException) -> str:
    """What it says, after its frames let go of their values: until then the tensors in them live."""
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__
    return str(error)


_WRITTEN = "Look for an extension or a program that changes a model's weights in place."


class _CorruptedWeights(Exception):
    """Resident weights differ from the bytes that were read. ``remedy``: what to do if it happens again."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.remedy = remedy
