"""One server for all tests of a process that do no harm to it."""

from __future__ import annotations

from collections.abc import Generator

import httpx
import pytest
from support.serving import Server, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as made:
        made.ready()
        yield made


@pytest.fixture
def http(server: Server) -> Generator[httpx.Client]:
    with server.client() as client:
        yield client
