"""What is assumed of a request before its model's defaults are known: for estimates, and for checks of its fields."""

from __future__ import annotations

from safelight.request.samplers import Schedule

USUAL_STEPS, USUAL_CFG, USUAL_SAMPLER = 20, 7.0, "euler"
"""The defaults of Stable Diffusion. Other families have their own (:class:`safelight.families.family.Defaults`)."""


class AssumedValues:
    """The values of fields that a request may leave to its model. After the request was resolved, they are its own."""

    __slots__ = ()

    steps: int | None
    cfg: float | None
    sampler: str | None
    schedule: Schedule | None
    clip_skip: int | None

    @property
    def step_count(self) -> int:
        """The number of steps. Before the model's default is known, it is an estimate: :data:`USUAL_STEPS`."""
        return USUAL_STEPS if self.steps is None else self.steps

    @property
    def guidance_scale(self) -> float:
        """The scale of classifier-free guidance. Before the model's default is known: :data:`USUAL_CFG`."""
        return USUAL_CFG if self.cfg is None else self.cfg

    @property
    def sampler_name(self) -> str:
        """The sampler. Before the model's default is known: :data:`USUAL_SAMPLER`."""
        return USUAL_SAMPLER if self.sampler is None else self.sampler

    @property
    def schedule_name(self) -> Schedule:
        """The schedule. Before the model's default is known: ``default``."""
        return "default" if self.schedule is None else self.schedule

    @property
    def skipped_layers(self) -> int:
        """The text encoder's last layers that are skipped. Before the model's default is known: 0."""
        return self.clip_skip or 0
