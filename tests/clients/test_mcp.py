"""The Model Context Protocol, by its own client: over standard input and output, and over HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from support.serving import Server, serving

pytest.importorskip("mcp")
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client

SMALL = {"prompt": "red apple", "model": "starter-noto", "width": 64, "height": 64, "steps": 3, "seed": 5}


def picture_of(answer: Any, at: int = 0) -> Image.Image:
    assert not answer.is_error, answer.content
    assert answer.content[at].mime_type == "image/jpeg"
    return Image.open(io.BytesIO(base64.b64decode(answer.content[at].data)))


async def use_everything(client: Client) -> None:
    tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert tools.keys() == {"generate_image", "edit_image", "list_models", "describe_job"}
    assert tools["generate_image"].input_schema["properties"]["steps"]["description"].startswith("Sampling steps")
    models = (await client.call_tool("list_models", {})).structured_content
    assert "starter-noto" in [row["name"] for row in models["result"]]
    seen: list[float] = []

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        del message
        assert total == 2
        seen.append(progress)

    made = await client.call_tool("generate_image", SMALL | {"count": 2}, progress_callback=on_progress)
    assert picture_of(made).size == picture_of(made, 1).size == (64, 64)
    assert seen == sorted(seen)
    images = made.structured_content["images"]
    assert [one["seed"] for one in images] == [5, 6]
    assert httpx.get(images[1]["url"]).headers["content-type"] == "image/png"
    [job_id] = made.structured_content["jobs"]
    job = (await client.call_tool("describe_job", {"job": job_id})).structured_content
    assert (job["state"], job["images"]) == ("done", [one["id"] for one in images])
    chosen = await client.call_tool("generate_image", SMALL | {"prompt": "{red|green} apple", "count": 2})
    assert len(chosen.structured_content["jobs"]) == len(chosen.structured_content["images"]) == 2
    held = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(held, "PNG")
    plain = base64.b64encode(held.getvalue()).decode()
    for image in (images[0]["id"], plain, f"data:image/png;base64,{plain}"):
        ask = {"image": image, "prompt": "a leaf", "model": "starter-noto", "steps": 3, "strength": 0.7, "seed": 1}
        assert picture_of(await client.call_tool("edit_image", ask)).size == (64, 64)
    for tool, ask, says in (
        ("generate_image", SMALL | {"model": "nobody"}, "no model named 'nobody'"),
        ("generate_image", SMALL | {"width": 65}, "multiple of 8"),
        ("edit_image", {"image": "no picture!", "prompt": "x"}, "is not an image's identifier"),
        ("edit_image", {"image": "0" * 32, "prompt": "x"}, "404"),
        ("describe_job", {"job": "0" * 32}, "404"),
    ):
        refused = await client.call_tool(tool, ask)
        assert refused.is_error
        assert says in refused.content[0].text, refused.content[0].text


def over_http(url: str, use: Callable[[Client], Awaitable[None]], key: str = "") -> None:
    import httpx2

    async def run() -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with httpx2.AsyncClient(headers=headers, timeout=60) as http:
            transport = streamable_http_client(f"{url}/mcp", http_client=http)
            async with Client(transport) as client:
                await use(client)

    asyncio.run(run())


def test_over_http(server: Server) -> None:
    over_http(server.url, use_everything)


def test_a_client_that_leaves_cancels_its_jobs(server: Server) -> None:
    async def leave(client: Client) -> None:
        ask = SMALL | {"prompt": "{red|green} fox", "count": 2, "steps": 150}
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.call_tool("generate_image", ask), 0.5)

    over_http(server.url, leave)
    with server.client() as http:
        until = time.monotonic() + 20
        while True:
            states = [job["state"] for job in http.get("/api/v1/jobs", params={"limit": 2}).json()]
            if states == ["cancelled", "cancelled"]:
                return
            assert time.monotonic() < until, states
            time.sleep(0.1)


def test_a_cancelled_job_hides_no_image_of_another(server: Server) -> None:
    async def make(client: Client) -> None:
        ask = SMALL | {"prompt": "{red|green} hare", "count": 2, "steps": 60}
        called = asyncio.create_task(client.call_tool("generate_image", ask))
        with server.client() as http:
            jobs: list[dict[str, Any]] = []
            while len(jobs) < 2:
                await asyncio.sleep(0.05)
                found = http.get("/api/v1/jobs").json()
                jobs = [job for job in found if job["request"]["prompt"].endswith("hare")]
            http.post(f"/api/v1/jobs/{jobs[0]['id']}/cancel")
        made = (await called).structured_content
        assert len(made["images"]) == 1
        assert [jobs[0]["id"] in problem for problem in made["problems"]] == [True]

    over_http(server.url, make)


def test_a_server_with_a_key(root: Path, tmp_path: Path) -> None:
    async def list_models(client: Client) -> None:
        found = await client.call_tool("list_models", {})
        assert found.structured_content["result"]

    with serving(tmp_path / "keyed", key="secret-key") as server:
        over_http(server.url, list_models, "secret-key")
        with server.client() as http:
            assert http.post("/mcp", headers={"Authorization": "Bearer another-key"}, json={}).status_code == 401


def stdio(*more: str) -> StdioServerParameters:
    return StdioServerParameters(command=sys.executable, args=["-m", "safelight.cli", "mcp", *more])


def test_over_standard_input_and_output(server: Server, tmp_path: Path) -> None:
    """An input image may be a path there."""

    async def run() -> None:
        async with Client(stdio("--server", server.url, "--root", str(tmp_path))) as client:
            Image.new("RGB", (64, 64), "blue").save(tmp_path / "blue.png")
            ask = {"image": str(tmp_path / "blue.png"), "prompt": "a leaf", "model": "starter-noto", "steps": 2}
            assert picture_of(await client.call_tool("edit_image", ask)).size == (64, 64)

    asyncio.run(run())


@pytest.mark.full
def test_a_server_is_started_for_the_time(root: Path) -> None:
    async def run() -> None:
        async with Client(stdio("--root", str(root)), read_timeout_seconds=120) as client:
            assert picture_of(await client.call_tool("generate_image", SMALL)).size == (64, 64)

    asyncio.run(run())


def test_a_server_without_the_extra_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from safelight import extras
    from safelight.server.mcp_route import ProtocolRoute
    from safelight.server.problems import RefusedError

    monkeypatch.setattr(extras, "installed", lambda: ("server",))
    route = ProtocolRoute(None, None)  # type: ignore[arg-type]
    with pytest.raises(RefusedError, match=r"needs the extra mcp: safelight\[mcp\]"):
        asyncio.run(route({}, None, None))  # type: ignore[arg-type]
