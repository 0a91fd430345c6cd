"""The tools of the Model Context Protocol: generate and edit images, list models, describe a job.

They are a client of Safelight's own HTTP API, so ``safelight mcp`` and the server's ``/mcp`` do the same as any client.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import anyio
import httpx
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import CallToolResult, ImageContent, TextContent, ToolAnnotations
from pydantic import BaseModel, Field

from safelight.version import VERSION

POLL_SECONDS = 0.3

CANCEL_SECONDS = 10.0
"""How long the cancellation of jobs may take when nobody waits for them any more."""

MOST_IMAGES = 4
"""Images of one call. A client's model reads all of them."""

MOST_IMAGE_BYTES = 64 << 20
"""An input image has at most these bytes. The server has its own limit, ``max_body_bytes``."""

INSTRUCTIONS = """Makes and edits images with the diffusion models of a Safelight server. Call list_models to see the
names of models. Each answer has the images (JPEG) and their identifiers, which edit_image takes as its input."""

Connect = Callable[[Mapping[str, str] | None], httpx.AsyncClient]
"""Returns a client of the server, which the tool closes. Called with the headers of the tool's caller, if any."""

Model = Annotated[str, Field(description="The name of a model, from list_models; the server's default if empty.")]
Prompt = Annotated[str, Field(description="What to draw.", min_length=1)]
Negative = Annotated[str, Field(description="What to keep out of the image; not every model reads it.")]
Side = Annotated[int | None, Field(description="Pixels, a multiple of 8; the model's own by default.", ge=8, le=4096)]
Steps = Annotated[int | None, Field(description="Sampling steps; the model's own by default.", ge=1, le=1000)]
Cfg = Annotated[float | None, Field(description="Scale of classifier-free guidance.", ge=0, le=100)]
Seed = Annotated[int | None, Field(description="The same seed gives the same image; random by default.", ge=0)]
Count = Annotated[int, Field(description="Number of images.", ge=1, le=MOST_IMAGES)]
Picture = Annotated[
    str, Field(description="An earlier image's identifier, a data: URL, or base64; with `safelight mcp`, also a path.")
]


class MadeImage(BaseModel):
    """An image. ``url``: its PNG file, with metadata."""

    id: str
    seed: int
    width: int
    height: int
    url: str


class MadeImages(BaseModel):
    """The images of a request.

    ``jobs``: with choices in the prompt or several slots, there is more than one.
    ``problems``: why images are missing; empty if none is.
    """

    jobs: list[str]
    model: str
    images: list[MadeImage]
    problems: list[str]


class ModelRow(BaseModel):
    """A model. ``resolution``: pixels per side at which it makes its best images."""

    name: str
    family: str
    variant: str
    resolution: int
    defaults: dict[str, Any]


class JobState(BaseModel):
    """A job. ``error``: why it failed; "" otherwise."""

    id: str
    state: str
    model: str
    prompt: str
    error: str
    images: list[str]


def make_server(connect: Connect, paths: bool) -> MCPServer:
    """Return the protocol's server.

    ``connect``: connects to Safelight's HTTP API.
    ``paths``: whether the input image may be a path of this machine.
    """
    server = MCPServer("safelight", instructions=INSTRUCTIONS, version=VERSION, log_level="WARNING")
    tools = _Tools(connect, paths)
    server.tool(title="Generate images")(tools.generate_image)
    server.tool(title="Edit an image")(tools.edit_image)
    read_only = ToolAnnotations(read_only_hint=True)
    server.tool(title="List models", annotations=read_only)(tools.list_models)
    server.tool(title="Describe a job", annotations=read_only)(tools.describe_job)
    return server


class _Tools:
    def __init__(self, connect: Connect, paths: bool) -> None:
        self._connect, self._paths = connect, paths

    async def generate_image(
        self,
        prompt: Prompt,
        ctx: Context,
        model: Model = "",
        negative: Negative = "",
        width: Side = None,
        height: Side = None,
        steps: Steps = None,
        cfg: Cfg = None,
        seed: Seed = None,
        count: Count = 1,
    ) -> Annotated[CallToolResult, MadeImages]:
        """Generate images from a text."""
        fields = {"prompt": prompt, "negative": negative, "width": width, "height": height, "steps": steps}
        async with self._connect(ctx.headers) as client:
            return await _make(client, ctx, model, {**fields, "cfg": cfg, "seed": seed, "count": count})

    async def edit_image(
        self,
        image: Picture,
        prompt: Prompt,
        ctx: Context,
        mask: Annotated[str, Field(description="Its white part is drawn again; in the same form as image.")] = "",
        strength: Annotated[
            float, Field(description="How much changes: above 0, at most 1. Models that edit by reference ignore it.")
        ] = 0.75,
        model: Model = "",
        negative: Negative = "",
        steps: Steps = None,
        cfg: Cfg = None,
        seed: Seed = None,
        count: Count = 1,
    ) -> Annotated[CallToolResult, MadeImages]:
        """Draw an image again after a text, as a whole or within a mask."""
        async with self._connect(ctx.headers) as client:
            fields: dict[str, Any] = {"prompt": prompt, "negative": negative, "steps": steps, "cfg": cfg, "seed": seed}
            fields |= {"count": count, "image": await self._picture(client, image), "strength": strength}
            if mask:
                fields["mask"] = await self._picture(client, mask)
            return await _make(client, ctx, model, fields)

    async def list_models(self, ctx: Context) -> list[ModelRow]:
        """List the models that make images."""
        async with self._connect(ctx.headers) as client:
            rows = await _get(client, "/api/v1/models")
        return [
            ModelRow(
                name=row["name"],
                family=row["base"],
                variant=row["variant"],
                resolution=row["resolution"],
                defaults=row["defaults"],
            )
            for row in rows
        ]

    async def describe_job(
        self, job: Annotated[str, Field(description="The identifier that a tool returned.")], ctx: Context
    ) -> JobState:
        """Say whether a job waits, runs, is done or has failed, and which images it has made."""
        if not _is_identifier(job):
            raise ToolError(f"{job[:60]!r} is no identifier of a job")
        async with self._connect(ctx.headers) as client:
            found = await _get(client, f"/api/v1/jobs/{job}")
            images = await _get(client, f"/api/v1/jobs/{job}/images")
        return JobState(
            id=found["id"],
            state=found["state"],
            model=found["request"]["model"],
            prompt=found["request"]["prompt"],
            error=found["reason"] if found["state"] == "failed" else "",
            images=[one["id"] for one in images],
        )

    async def _picture(self, client: httpx.AsyncClient, given: str) -> str:
        """Return an input image as a data URL. Raises ToolError."""
        if given.startswith("data:"):
            return given
        if _is_identifier(given):
            answer = await _answer(client.get(f"/api/v1/images/{given}/file"))
            return f"data:image/png;base64,{base64.b64encode(answer.content).decode()}"
        path = _user_path(given) if self._paths and len(given) < 4096 else None
        if path is not None and path.is_file():
            if path.stat().st_size > MOST_IMAGE_BYTES:
                raise ToolError(f"{path} has more than {MOST_IMAGE_BYTES >> 20} MB")
            return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        try:
            base64.b64decode(given, validate=True)
        except (binascii.Error, ValueError):
            kinds = "an image's identifier, a data: URL, or base64" + (", or the path of a file" if self._paths else "")
            raise ToolError(f"{given[:60]!r} is not {kinds}") from None
        return f"data:image/png;base64,{given}"


def _is_identifier(text: str) -> bool:
    return len(text) == 32 and all(sign in "0123456789abcdef" for sign in text)


def _user_path(text: str) -> Path | None:
    """Return the path that a user wrote, None if it is none."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return None


async def _make(client: httpx.AsyncClient, ctx: Context, model: str, fields: dict[str, Any]) -> CallToolResult:
    """Make the images of a request, report the progress, and return them."""
    given = {name: value for name, value in fields.items() if value not in (None, "")}
    if model:
        given["model"] = model
    ids = (await _answer(client.post("/api/v1/generate", json=given | {"spread": True}))).json()["jobs"]
    try:
        jobs = await _wait(client, ctx, ids)
    except BaseException:
        # The client does not wait any more, or the server does not answer.
        with anyio.move_on_after(CANCEL_SECONDS, shield=True):
            for job in ids:
                with contextlib.suppress(httpx.HTTPError):
                    await client.post(f"/api/v1/jobs/{job}/cancel")
        raise
    rows = [row for job in ids for row in await _get(client, f"/api/v1/jobs/{job}/images")]
    problems = [f"the job {job['id']} is {job['state']}: {job['reason']}" for job in jobs if job["state"] != "done"]
    if problems and not rows:
        raise ToolError("; ".join(problems))
    content: list[Any] = []
    for row in rows:
        path = f"/api/v1/images/{row['id']}/file"
        file = await _answer(client.get(path, params={"format": "jpeg", "quality": 90}))
        data = base64.b64encode(file.content).decode()
        content.append(ImageContent(type="image", data=data, mime_type="image/jpeg"))
    images = [
        MadeImage(
            id=row["id"],
            seed=row["seed"],
            width=row["width"],
            height=row["height"],
            url=f"{str(client.base_url).rstrip('/')}/api/v1/images/{row['id']}/file",
        )
        for row in rows
    ]
    made = MadeImages(jobs=ids, model=jobs[0]["request"]["model"], images=images, problems=problems)
    content.append(TextContent(type="text", text=made.model_dump_json()))
    return CallToolResult(content=content, structured_content=made.model_dump())


async def _wait(client: httpx.AsyncClient, ctx: Context, ids: Sequence[str]) -> list[dict[str, Any]]:
    """Wait until all jobs have ended, and return them. Report each step."""
    reported = -1.0
    while True:
        jobs = [await _get(client, f"/api/v1/jobs/{job}") for job in ids]
        if all(job["ended"] is not None for job in jobs):
            return jobs
        running = (await _get(client, "/api/v1/queue"))["running"]
        now = {one["job"]["id"]: one["progress"] for one in running if one["progress"] is not None}
        done = sum(_images_done(job, now.get(job["id"])) for job in jobs)
        if done > reported:
            reported = done
            total = sum(job["request"]["count"] for job in jobs)
            await ctx.report_progress(done, total, f"{done / total:.0%}")
        await asyncio.sleep(POLL_SECONDS)


def _images_done(job: Mapping[str, Any], progress: Mapping[str, Any] | None) -> float:
    if job["ended"] is not None:
        return job["request"]["count"]
    if progress is None:
        return job["images"]
    share = {"denoise": progress["step"] / max(1, progress["steps"]), "decode": 1.0}
    return progress["image"] + share.get(progress["stage"], 0.0)


async def _get(client: httpx.AsyncClient, path: str) -> Any:
    return (await _answer(client.get(path))).json()


async def _answer(asked: Awaitable[httpx.Response]) -> httpx.Response:
    """Return an answer. Raises ToolError, with the server's words, for a refusal."""
    try:
        answer = await asked
    except httpx.HTTPError as error:
        raise ToolError(f"the Safelight server does not answer ({error or type(error).__name__})") from error
    if answer.is_success:
        return answer
    try:
        said = answer.json()
        message = said.get("message") or said.get("detail") or said
    except ValueError:
        message = answer.text[:200]
    raise ToolError(f"the server refused it ({answer.status_code}): {message}")
