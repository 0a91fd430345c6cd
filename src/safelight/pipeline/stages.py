"""Runs a stage: leases and binds its components, computes, and tries again after a failure.

Before the next attempt, Safelight clears the error's frames and evicts all weights that no lease holds. If memory ran
out, it reserves more working memory. If weights were corrupted, it reads them again. If a module was modified, it
builds a new one.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn

from safelight.catalog.model import Model
from safelight.devices import machine
from safelight.devices.base import free_cache
from safelight.devices.failures import translate_torch_errors
from safelight.errors import IntegrityError, ModuleModifiedError, OutOfMemoryError, shortened
from safelight.families.family import CONTROLNET
from safelight.logs import Log
from safelight.memory.lease import Lease, Use
from safelight.memory.segments import piece_keys
from safelight.memory.working_memory import Workload
from safelight.models.bind import bind
from safelight.models.skeleton import SkeletonKey
from safelight.pipeline.resources import Resources, dtype_of
from safelight.pipeline.workload import describe_workload
from safelight.request.adapters import Purpose
from safelight.request.results import Repair, Seconds
from safelight.request.run_settings import RunSettings
from safelight.weights.manifest import ComponentManifest
from safelight.weights.overlay import OverlaidComponent

_log = Log(__name__)

Result = TypeVar("Result")

ATTEMPTS = 3
"""How often a stage is tried in all, if memory runs out, weights are corrupted or a module is modified."""


class Clock:
    """Adds up the seconds of each stage. Seconds for making weights resident and binding them count as ``switch``."""

    def __init__(self) -> None:
        self.spent = {"switch": 0.0, "encode": 0.0, "denoise": 0.0, "decode": 0.0}
        self.in_gates = 0.0

    @contextlib.contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Add the time spent in the context to stage ``name``."""
        start = time.perf_counter()
        switched = self.spent["switch"]
        try:
            yield
        finally:
            self.spent[name] += time.perf_counter() - start - (self.spent["switch"] - switched)

    @contextlib.contextmanager
    def gates(self) -> Generator[None]:
        """Add the time spent in the context to the gates. It also counts for its stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.in_gates += time.perf_counter() - start

    def seconds(self) -> Seconds:
        return Seconds(**self.spent, gates=self.in_gates)


@dataclass(frozen=True, slots=True)
class Task:
    """What a stage does.

    ``name``: encode, denoise or decode.
    ``pixels``: size of the input of each forward pass.
    ``forward_passes``: their number.
    ``variant``: distinguishes uses of one component, such as encoding and decoding by the VAE.
    ``following``: roles of the components that the image needs after this stage, in their order. None: those after the
    main component, in the order of the family's roles.
    ``seamless``: see :class:`safelight.models.skeleton.SkeletonKey`.
    ``tokens``: of a text with reference images; 0 for other inputs.
    """

    name: str
    pixels: int
    forward_passes: int
    variant: str = ""
    following: tuple[str, ...] | None = None
    seamless: str = ""
    tokens: int = 0


Compute = Callable[[list[nn.Module], list[Lease]], Result]


class Stages:
    """Runs the stages of one image that ``model`` computes.

    ``clock``: adds up the image's seconds.
    ``repairs``: the image's list, to which repairs are added: what was wrong, and what fixed it.
    """

    def __init__(self, model: Model, resources: Resources, clock: Clock, repairs: list[Repair]) -> None:
        self.model = model
        self.resources = resources
        self.clock = clock
        self.repairs = repairs

    def run(
        self,
        task: Task,
        run_settings: RunSettings,
        components: Sequence[tuple[ComponentManifest, torch.dtype]],
        compute: Compute[Result],
    ) -> Result:
        """Run ``compute`` with the bound modules and return its result.

        ``run_settings``: those of the stage.
        ``components``: with their dtypes, in the order of the modules. The first is the main component.
        """
        role = components[0][0].role
        for attempt in range(ATTEMPTS):
            try:
                with self.clock.stage(task.name), translate_torch_errors(f"{self.model.name}'s {role}"):
                    return self._once(task, run_settings, components, compute)
            except OutOfMemoryError as error:
                if error.final or attempt == ATTEMPTS - 1:
                    raise
                why = clear_frames(error)
            except _CorruptedWeights as error:
                if attempt == ATTEMPTS - 1:
                    problem = f"{error}, in {ATTEMPTS} attempts"
                    raise IntegrityError(self.model.path, "", problem, error.remedy) from error
                why = clear_frames(error)
                self.repairs.append(Repair("memory", why, "read again"))
                self.resources.embedding_cache.clear()
            except ModuleModifiedError as error:
                if attempt == ATTEMPTS - 1:
                    raise
                why = clear_frames(error)
                self.repairs.append(Repair("state", why, "computed with a newly built model"))
                self.resources.embedding_cache.clear()
            _log.warning("repeating a stage", stage=task.name, role=role, why=why)
            self.resources.residency.drop()
            free_cache(self.resources.device)
            machine.trim_allocator()
        raise AssertionError

    def _once(
        self,
        task: Task,
        run_settings: RunSettings,
        components: Sequence[tuple[ComponentManifest, torch.dtype]],
        compute: Compute[Result],
    ) -> Result:
        resources = replace(self.resources, run_settings=run_settings)
        start = time.perf_counter()
        workload = describe_stage(components, run_settings, task)
        uses = plan_uses(self.model, resources, components, workload, task)
        with contextlib.ExitStack() as held:
            leases: list[Lease] = []
            # The main component is leased last and takes the room that is left.
            for (component, dtype), use in reversed(list(zip(components, uses, strict=True))):
                leases.insert(0, held.enter_context(resources.residency.lease(component, dtype, use)))
            with contextlib.ExitStack() as binding:
                modules: list[nn.Module] = []
                for lease in leases:
                    key = skeleton_key(self.model, lease.component, lease.dtype, resources, task.seamless)
                    modules.append(binding.enter_context(bind(resources.skeletons, key, lease)))
                self.clock.spent["switch"] += time.perf_counter() - start
                with self._heap(task, leases), resources.measure_peak() as peak, self._record_shortage(workload):
                    result = compute(modules, leases)
                    used = peak()
                modules.clear()
            resources.verification.add_computing_time(time.perf_counter() - start)
            for lease in leases:
                self._verify_weights(lease)
        if used is not None:
            resources.working_memory_estimator.learn(workload, used)
        machine.trim_allocator()
        return result

    def _heap(self, task: Task, leases: Sequence[Lease]) -> AbstractContextManager[None]:
        """Keep the heap small if the stage computes in host memory, and does not denoise or lacks room for weights."""
        small = task.name != "denoise" or any(lease.lacks_room for lease in leases)
        wanted = small and not self.resources.device.has_own_memory
        return machine.small_heap() if wanted else contextlib.nullcontext()

    def _verify_weights(self, lease: Lease) -> None:
        if lease.weights_modified:
            raise _CorruptedWeights(f"code wrote to the weights of the {lease.component.role}", _WEIGHTS_WRITTEN_REMEDY)
        verification = self.resources.verification
        # A copy that was not verified on arrival is verified here once, before the image is returned.
        first_check_due = lease.has_unverified and verification.policy == "auto"
        wrong = lease.corrupted
        if not wrong and (verification.due(lease.key) or first_check_due):
            with verification.timed():
                wrong = lease.verify()
        if wrong:
            verification.found_wrong()
            raise _CorruptedWeights(f"weights were corrupted in memory: {shortened(wrong)}", self._memory_remedy())

    def _memory_remedy(self) -> str:
        device = self.resources.device
        if device.has_own_memory:
            return f"The memory of {device.name} or its driver is unreliable; use --device cpu to work without it."
        return "Test this machine's memory, for example with memtest86+."

    @contextlib.contextmanager
    def _record_shortage(self, workload: Workload) -> Generator[None]:
        try:
            with translate_torch_errors(f"Computing an image by {self.model.name}"):
                yield
        except OutOfMemoryError as error:
            # ``needed`` is set if allocating a slab failed, and 0 if an operation ran out of memory.
            if not error.needed:
                self.resources.working_memory_estimator.record_shortage(workload)
            raise


def describe_stage(
    components: Sequence[tuple[ComponentManifest, torch.dtype]], run_settings: RunSettings, task: Task
) -> Workload:
    """Return the workload of a stage: that of its main component plus the estimates of the others."""
    (component, dtype), *beside = components
    variant = task.variant + (f"+{len(beside)}" if beside else "")
    workload = describe_workload(component, dtype, run_settings, task.pixels, variant, task.tokens)
    more = sum(describe_workload(other, kind, run_settings, task.pixels).guess for other, kind in beside)
    return replace(workload, guess=workload.guess + more)


def plan_uses(
    model: Model,
    resources: Resources,
    components: Sequence[tuple[ComponentManifest, torch.dtype]],
    workload: Workload,
    task: Task,
) -> list[Use]:
    """Return how a stage uses each of its components.

    Components are leased from the last to the first, the main one. So the last entry reserves the stage's working
    memory, and each entry leaves room for the minimum of the entries before it.
    """
    roles, role = model.roles, components[0][0].role
    after = roles[roles.index(role) + 1 :] if task.following is None else task.following
    rest = [model.manifest.component(r) for r in after]
    if model.family.denoiser in after:
        rest = [component for component in model.manifest.components if component.role == CONTROLNET] + rest
    of_rest = (piece_keys(one, dtype_of(resources.run_settings, model.family, one.role)) for one in rest)
    upcoming = (*(key for keys in of_rest for key in keys), *resources.upcoming)
    keys = [piece_keys(component, dtype) for component, dtype in components]
    working_memory_bytes = (
        resources.working_memory_estimator.estimate(workload)
        if resources.working_memory_override is None
        else resources.working_memory_override
    )
    # What is computed when a segment arrives is over before the stage computes, so the larger of both needs is enough.
    # What is computed meanwhile is part of the workload.
    working_memory_bytes = max(
        working_memory_bytes, *(c.working_bytes if isinstance(c, OverlaidComponent) else 0 for c, _ in components)
    )
    unread = [unread_tensors(model, component) for component, _ in components]
    least = [
        resources.residency.planner.min_weight_bytes(component, dtype, names)
        for (component, dtype), names in zip(components, unread, strict=True)
    ]
    last = len(components) - 1
    return [
        Use(
            task.forward_passes,
            working_memory_bytes if index == last else 0,
            (*(key for before in keys[:index] for key in before), *upcoming),
            sum(least[:index]),
            resources.residency.planner.dequantised_bytes(component, dtype),
            unread[index],
        )
        for index, (component, dtype) in enumerate(components)
    ]


def unread_tensors(model: Model, component: ComponentManifest) -> frozenset[str]:
    """Return the names of the component's tensors that the model's family never reads."""
    return model.family.unread(component.role, (tensor.name for tensor in component.tensors))


def skeleton_key(
    model: Model, component: ComponentManifest, dtype: torch.dtype, resources: Resources, seamless: str
) -> SkeletonKey:
    """Return the key of the skeleton to which a component is bound."""
    run_settings, device = resources.run_settings, resources.device.torch
    encodes_prompts = model.family.purpose(component.role) in (Purpose.TEXT_ENCODER, Purpose.VISION_ENCODER)
    axes = "" if encodes_prompts else seamless
    return SkeletonKey(
        model.base,
        component.role,
        component.config,
        dtype,
        run_settings.attention,
        device,
        run_settings.attention_slice_size,
        axes,
    )


def clear_frames(error: BaseException) -> str:
    """Clear the frames of an error and of its causes, because frames keep tensors alive. Return the message."""
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__
    return str(error)


_WEIGHTS_WRITTEN_REMEDY = "Look for an extension or a program that changes a model's weights in place."


class _CorruptedWeights(Exception):
    """Resident weights differ from the bytes that were read. ``remedy``: what to do if it happens again."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.remedy = remedy
