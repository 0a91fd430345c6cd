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
from support.people import add_people, key_of
from support.scale import thinned, times
from support.serving import Server, serving

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]

ENDLESS = ("/api/v1/events",)
"""Streams that end only when a job does."""

EXAMPLES = times(2, 15)
"""Of each operation, once by its schema and once against it."""


LIMITS = "max_pixels: 4096\nmax_steps: 3\nmax_images: 2\n"
"""So that what is asked by chance is made at once."""


@pytest.fixture(params=thinned(["gus", ""]), ids=["a guest", "without people"])
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Generator[Server]:
    """A server. Where it knows people, it is used by a guest, who may not use all routes."""
    (tmp_path / "safelight.yaml").write_text(LIMITS)
    if request.param:
        add_people(tmp_path)
    with serving(tmp_path) as made:
        made.ready()
        made.key = key_of(request.param) if request.param else None
        yield made


def test_every_answer_is_documented(server: Server) -> None:
    headers = {"Authorization": f"Bearer {server.key}"} if server.key else {}
    url = f"{server.url}/api/v1/openapi.json"
    described = schemathesis.openapi.from_url(url, headers=headers).exclude(path=list(ENDLESS))
    tried: set[str] = set()
    for found in described.get_all_operations():
        operation = found.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            def check(case: schemathesis.Case) -> None:
                tried.add(f"{case.method} {case.path}")
                case.call_and_validate(checks=CHECKS, timeout=120, headers=headers)

            # What takes no arguments cannot be asked wrongly.
            with contextlib.suppress(Unsatisfiable) if mode is GenerationMode.NEGATIVE else contextlib.nullcontext():
                check()
    assert len(tried) > 30
