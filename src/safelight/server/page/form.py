"""The form: the prompt, the models and the other fields of a request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from nicegui import ui

from safelight.assembly.services import Services
from safelight.errors import InputError, RequestError
from safelight.request.adapters import Lora
from safelight.request.field import fields_of
from safelight.request.prompts.loras import lora_to_tag
from safelight.request.prompts.variants import escaped
from safelight.request.run_settings import PRECISIONS
from safelight.request.samplers import SAMPLERS, SCHEDULES
from safelight.request.schema import Request
from safelight.server import intake
from safelight.server.page.form_sections import Further, section
from safelight.weights.adapter_file import INVERSION
from safelight.weights.adapter_kinds import WEIGHT_ADAPTER_KINDS

LABELS = {name: field.label for name, field in fields_of(Request).items()}


class Form:
    """The form of a tab. ``make`` receives one request for each chosen model."""

    def __init__(self, control: Services, make: Callable[[list[Request]], Awaitable[None]]) -> None:
        self._control = control
        self._make = make
        names = [card.name for card in control.library.cards()]
        first = control.settings.default_model
        with ui.element("form").classes("sl-card").on("submit.prevent", self._submit):
            self._prompt = ui.textarea(LABELS["prompt"]).props(
                'outlined autogrow rows=3 autofocus input-class="sl-prompt"'
            )
            self._prompt.on("keydown.ctrl.enter", self._submit)
            self._adapters()
            self._models = ui.select(
                names, multiple=True, label="Models", value=[first] if first in names else names[:1]
            ).props("outlined use-chips options-dense")
            with ui.element("div").classes("sl-pair"):
                self._steps = ui.number(LABELS["steps"], min=1, precision=0, placeholder=OWN).props("outlined dense")
                self._seed = ui.number(LABELS["seed"], min=0, precision=0, placeholder="any").props("outlined dense")
            self._more_fields()
            self.further = Further(control)
            ui.button("Make", on_click=self._submit).props("unelevated no-caps").classes("sl-make")

    def _adapters(self) -> None:
        """Add a list of adapters. A choice adds the adapter's tag or word to the prompt; a tag has the strength."""
        kinds = {adapter.name: adapter.kind for adapter in self._control.catalog.adapters.cards()}
        names = [name for name, kind in kinds.items() if kind in WEIGHT_ADAPTER_KINDS or kind == INVERSION]
        if not names:
            return
        chosen = ui.select(names, label="Add an adapter").props("outlined dense options-dense")

        def add() -> None:
            if chosen.value:
                name = str(chosen.value)
                word = f"<{name}>" if kinds[name] == INVERSION else lora_to_tag(Lora(name))
                self._prompt.set_value(f"{self._prompt.value or ''} {word}".strip())
                chosen.set_value(None)

        chosen.on_value_change(add)

    def _more_fields(self) -> None:
        with section("More"):
            self._negative = ui.textarea(LABELS["negative"]).props("outlined autogrow dense rows=1")
            with ui.element("div").classes("sl-pair"):
                self._width = _side(LABELS["width"])
                self._height = _side(LABELS["height"])
            with ui.element("div").classes("sl-pair"):
                self._cfg = ui.number(LABELS["cfg"], min=0, max=100, step=0.5, placeholder=OWN).props("outlined dense")
                self._guidance = ui.number(LABELS["guidance"], min=0, max=100, step=0.5, placeholder=OWN).props(
                    "outlined dense"
                )
            with ui.element("div").classes("sl-pair"):
                self._shift = ui.number(LABELS["shift"], min=0, max=100, step=0.5, placeholder=OWN).props(
                    "outlined dense"
                )
                self._first_block_cache = ui.number(
                    LABELS["first_block_cache"], value=0, min=0, max=1, step=0.05
                ).props("outlined dense")
            self._count = ui.number(LABELS["count"], value=1, min=1, precision=0).props("outlined dense")
            samplers = {"": OWN} | {name: sampler.a1111 for name, sampler in SAMPLERS.usable()}
            self._sampler = ui.select(samplers, label=LABELS["sampler"], value="").props("outlined dense")
            schedules = {"": OWN} | {name: name for name in SCHEDULES}
            self._schedule = ui.select(schedules, label=LABELS["schedule"], value="").props("outlined dense")
            with ui.element("div").classes("sl-pair"):
                self._clip_skip = ui.number(LABELS["clip_skip"], min=0, max=11, precision=0, placeholder=OWN).props(
                    "outlined dense"
                )
                self._precision = ui.select(list(PRECISIONS), label=LABELS["precision"], value="auto").props(
                    "outlined dense"
                )

    async def _submit(self) -> None:
        try:
            requests = self._requests()
        except InputError as error:
            ui.notify(str(error), type="negative", multi_line=True, timeout=8000)
            return
        await self._make(requests)

    def _requests(self) -> list[Request]:
        models: list[str] = self._models.value or []
        if not models:
            raise RequestError("model", "", "choose at least one model")
        count = _whole(self._count.value) or 1
        seed = _whole(self._seed.value)
        seed = intake.some_seed(count) if seed is None else seed
        further = self.further.values()
        return [
            Request(
                prompt=self._prompt.value or "",
                model=model,
                negative=self._negative.value or "",
                seed=seed,
                steps=_whole(self._steps.value),
                width=_whole(self._width.value),
                height=_whole(self._height.value),
                cfg=self._cfg.value,
                guidance=self._guidance.value,
                shift=self._shift.value,
                first_block_cache=self._first_block_cache.value or 0.0,
                sampler=self._sampler.value or None,
                schedule=self._schedule.value or None,
                count=count,
                clip_skip=_whole(self._clip_skip.value),
                precision=self._precision.value,
                **further,
            )
            for model in models
        ]

    def _fields(self) -> dict[str, Any]:
        return {
            "prompt": self._prompt,
            "negative": self._negative,
            "models": self._models,
            "steps": self._steps,
            "seed": self._seed,
            "width": self._width,
            "height": self._height,
            "cfg": self._cfg,
            "guidance": self._guidance,
            "shift": self._shift,
            "first_block_cache": self._first_block_cache,
            "count": self._count,
            "sampler": self._sampler,
            "schedule": self._schedule,
            "clip_skip": self._clip_skip,
            "precision": self._precision,
        }

    def kept(self) -> dict[str, Any]:
        """Return the values of the form, as JSON can store them."""
        try:
            further = self.further.values()
        except InputError:
            # The user has not completed these fields yet.
            further = {}
        further["controls"] = [asdict(control) for control in further.get("controls", ())]
        return {**{name: field.value for name, field in self._fields().items()}, "further": further}

    def restore(self, stored: dict[str, Any]) -> None:
        """Set the form to values from :meth:`kept`. Models that the library no longer has are left out."""
        existing = {card.name for card in self._control.library.cards()}
        for name, field in self._fields().items():
            if name in stored:
                value = stored[name]
                field.set_value([model for model in value if model in existing] if name == "models" else value)
        if stored.get("further"):
            self.further.fill(stored["further"])

    def fill(self, request: dict[str, Any]) -> None:
        """Set every field to its value in an image's request."""
        loras = [lora_to_tag(Lora(**lora)) for lora in request.get("loras", ())]
        self._prompt.set_value(" ".join([escaped(request["prompt"]), *loras]))
        self._negative.set_value(escaped(request["negative"]))
        self._seed.set_value(request["seed"])
        self._steps.set_value(request["steps"])
        self._width.set_value(request["width"])
        self._height.set_value(request["height"])
        self._cfg.set_value(request["cfg"])
        self._guidance.set_value(request.get("guidance"))
        self._shift.set_value(request.get("shift"))
        self._first_block_cache.set_value(request.get("first_block_cache", 0))
        self._sampler.set_value(request["sampler"])
        self._schedule.set_value(request["schedule"])
        self._count.set_value(1)
        self._clip_skip.set_value(request["clip_skip"])
        self._precision.set_value(request["precision"])
        self.further.fill(request)
        exists = any(card.name == request["model"] for card in self._control.library.cards())
        self._models.set_value([request["model"]] if exists else [])
        if not exists:
            ui.notify(f"The library no longer has the model {request['model']}: choose another one.", type="warning")


OWN = "the model's own"
"""What a field without a value shows."""


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _side(label: str) -> ui.number:
    return ui.number(label, min=8, step=8, precision=0, placeholder="model's").props("outlined dense")
