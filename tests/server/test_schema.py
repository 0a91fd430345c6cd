"""The whole of the OpenAPI description is true: no answer that it does not name, none of 5xx."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from support.scale import times
from support.serving import Server, serving

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]

ENDLESS = ("/api/v1/events",)
"""Streams that end only when a job does."""

EXAMPLES = times(2, 15)
"""Of each operation, once by its schema and once against it."""


LIMITS = "max_pixels: 4096\nmax_steps: 3\nmax_images: 2\n"
"""So that what is asked by chance is made at once."""


@pytest.fixture
def server(tmp_path: Path) -> Generator[Server]:
    (tmp_path / "safelight.yaml").write_text(LIMITS)
    with serving(tmp_path) as made:
        made.ready()
        yield made


def test_every_answer_is_documented(server: Server) -> None:
    described = schemathesis.openapi.from_url(f"{server.url}/api/v1/openapi.json").exclude(path=list(ENDLESS))
    tried: set[str] = set()
    for found in described.get_all_operations():
        operation = found.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            def check(case: schemathesis.Case) -> None:
                tried.add(f"{case.method} {case.path}")
                case.call_and_validate(checks=CHECKS, timeout=120)

            # What takes no arguments cannot be asked wrongly.
            with contextlib.suppress(Unsatisfiable) if mode is GenerationMode.NEGATIVE else contextlib.nullcontext():
                check()
    assert len(tried) > 30
