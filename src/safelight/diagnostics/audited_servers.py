"""Clients for an audit of image servers, one per API: Safelight, AUTOMATIC1111, OpenAI, InvokeAI, ComfyUI. No torch."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import httpx

from safelight.errors import InputError, SafelightError
from safelight.weights.adapter_kinds import WEIGHT_ADAPTER_KINDS

WAIT_SECONDS = 1800.0
"""Limit of seconds for one image."""


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """A request for one image.

    ``size``: pixels per side.
    ``lora``: a name from the server's list; empty for none.
    """

    prompt: str
    seed: int
    steps: int
    size: int
    model: str = ""
    lora: str = ""

    def for_model(self, model: str, lora: str) -> ImageRequest:
        """Return the same request for another model and adapter."""
        return replace(self, model=model, lora=lora)


class Server(Protocol):
    """The methods of a server that an audit needs. Every method raises SafelightError with the reason of a failure."""

    def models(self) -> list[str]:
        """Return the names of all models."""
        ...

    def loras(self, model: str) -> list[str]:
        """Return the names of the adapters for a model, or of all adapters if the API does not give their base."""
        ...

    def make(self, request: ImageRequest) -> bytes:
        """Make an image. Return the bytes of its file."""
        ...


class _HTTP:
    """A server over HTTP. ``url``: its address. ``key``: a bearer token, None if it needs none."""

    def __init__(self, url: str, key: str | None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            self.client = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=WAIT_SECONDS)
        except (httpx.InvalidURL, ValueError, TypeError) as error:
            raise InputError(f"{url} is not a valid address ({error})") from error

    def get(self, path: str, **more: Any) -> Any:
        return self._answer(lambda: self.client.get(path, **more)).json()

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._answer(lambda: self.client.post(path, json=body)).json()

    def data(self, path: str) -> bytes:
        return self._answer(lambda: self.client.get(path)).content

    def _answer(self, send: Any) -> httpx.Response:
        with self._transport_errors():
            answer: httpx.Response = send()
        if not answer.is_success:
            raise SafelightError(f"{answer.request.url.path} answered {answer.status_code}: {answer.text[:200]}")
        return answer

    @contextmanager
    def _transport_errors(self) -> Generator[None]:
        """Translate httpx's transport errors to SafelightError."""
        try:
            yield
        except httpx.TransportError as error:
            raise SafelightError(f"the server cannot be reached ({error})") from error


class SafelightClient(_HTTP):
    """Safelight's own API."""

    def models(self) -> list[str]:
        return [model["name"] for model in self.get("/api/v1/models")]

    def loras(self, model: str) -> list[str]:
        bases = {known["name"]: known["base"] for known in self.get("/api/v1/models")}
        found = [adapter for adapter in self.get("/api/v1/adapters") if adapter["kind"] in WEIGHT_ADAPTER_KINDS]
        return [adapter["name"] for adapter in found if adapter["base"] in ("", bases.get(model, ""))]

    def make(self, request: ImageRequest) -> bytes:
        body = {
            "prompt": request.prompt,
            "model": request.model,
            "seed": request.seed,
            "steps": request.steps,
            "width": request.size,
            "height": request.size,
            "loras": [{"name": request.lora}] if request.lora else [],
        }
        job = self.post("/api/v1/generate", body)["id"]
        until = time.monotonic() + WAIT_SECONDS
        while (now := self.get(f"/api/v1/jobs/{job}"))["ended"] is None:
            if time.monotonic() > until:
                raise SafelightError(f"no image after {WAIT_SECONDS:.0f} s")
            time.sleep(0.05)
        if now["state"] != "done":
            raise SafelightError(f"its job {now['state']}: {now['reason']}")
        return self.data(self.get(f"/api/v1/jobs/{job}/images")[0]["url"])


class A1111Client(_HTTP):
    """AUTOMATIC1111's API, which Forge, SD.Next and others have too."""

    def models(self) -> list[str]:
        return [model["title"] for model in self.get("/sdapi/v1/sd-models")]

    def loras(self, model: str) -> list[str]:
        # The list does not give the adapters' bases.
        del model
        return [lora["name"] for lora in self.get("/sdapi/v1/loras")]

    def make(self, request: ImageRequest) -> bytes:
        prompt = f"{request.prompt} <lora:{request.lora}:1>" if request.lora else request.prompt
        body = {
            "prompt": prompt,
            "seed": request.seed,
            "steps": request.steps,
            "width": request.size,
            "height": request.size,
            "sampler_name": "Euler",
            "override_settings": {"sd_model_checkpoint": request.model},
        }
        images = self.post("/sdapi/v1/txt2img", body)["images"]
        return base64.b64decode(images[0].rpartition(",")[2]) if images else b""


class OpenAIClient(_HTTP):
    """OpenAI's API for images. It has no seed, but local servers accept one."""

    def models(self) -> list[str]:
        return [model["id"] for model in self.get("/v1/models")["data"]]

    def loras(self, model: str) -> list[str]:
        del model
        return []

    def make(self, request: ImageRequest) -> bytes:
        body = {
            "prompt": request.prompt,
            "model": request.model,
            "size": f"{request.size}x{request.size}",
            "response_format": "b64_json",
            "seed": request.seed,
            "steps": request.steps,
        }
        return base64.b64decode(self.post("/v1/images/generations", body)["data"][0]["b64_json"])


class InvokeAIClient(_HTTP):
    """InvokeAI's API (6.x): puts a graph into its queue. Supports checkpoints of SD 1 and SD 2."""

    def models(self) -> list[str]:
        return [model["name"] for model in self._listed("main") if model["base"] in ("sd-1", "sd-2")]

    def loras(self, model: str) -> list[str]:
        bases = {known["name"]: known["base"] for known in self._listed("main")}
        return [lora["name"] for lora in self._listed("lora") if lora["base"] == bases.get(model)]

    def _listed(self, kind: str) -> list[dict[str, Any]]:
        return self.get("/api/v2/models/", params={"model_type": kind})["models"]

    def _identifier(self, kind: str, name: str) -> dict[str, Any]:
        found = next(model for model in self._listed(kind) if model["name"] == name)
        return {key: found[key] for key in ("key", "hash", "name", "base", "type")}

    def make(self, request: ImageRequest) -> bytes:
        queued = self.post("/api/v1/queue/default/enqueue_batch", {"batch": {"graph": self._graph(request), "runs": 1}})
        item = queued["item_ids"][0]
        until = time.monotonic() + WAIT_SECONDS
        while (now := self.get(f"/api/v1/queue/default/i/{item}"))["status"] in ("pending", "in_progress"):
            if time.monotonic() > until:
                raise SafelightError(f"no image after {WAIT_SECONDS:.0f} s")
            time.sleep(0.1)
        if now["status"] != "completed":
            raise SafelightError(f"its job {now['status']}: {now.get('error_message')}")
        results = now["session"]["results"].values()
        name = next(result["image"]["image_name"] for result in results if result["type"] == "image_output")
        return self.data(f"/api/v1/images/i/{name}/full")

    def _graph(self, request: ImageRequest) -> dict[str, Any]:
        size = {"width": request.size, "height": request.size}
        nodes: dict[str, dict[str, Any]] = {
            "model": {"type": "main_model_loader", "model": self._identifier("main", request.model)},
            "positive": {"type": "compel", "prompt": request.prompt},
            "negative": {"type": "compel", "prompt": ""},
            "noise": {"type": "noise", "seed": request.seed, "use_cpu": True, **size},
            "denoise": {"type": "denoise_latents", "steps": request.steps, "cfg_scale": 7.0, "scheduler": "euler"},
            "image": {"type": "l2i", "fp32": True, "is_intermediate": False},
        }
        clip = ("model", "clip")
        unet = ("model", "unet")
        edges: list[tuple[tuple[str, str], tuple[str, str]]] = []
        if request.lora:
            nodes["lora"] = {"type": "lora_loader", "lora": self._identifier("lora", request.lora), "weight": 1.0}
            edges += [(unet, ("lora", "unet")), (clip, ("lora", "clip"))]
            clip, unet = ("lora", "clip"), ("lora", "unet")
        edges += [
            (clip, ("positive", "clip")),
            (clip, ("negative", "clip")),
            (unet, ("denoise", "unet")),
            (("positive", "conditioning"), ("denoise", "positive_conditioning")),
            (("negative", "conditioning"), ("denoise", "negative_conditioning")),
            (("noise", "noise"), ("denoise", "noise")),
            (("denoise", "latents"), ("image", "latents")),
            (("model", "vae"), ("image", "vae")),
        ]
        return {
            "id": "audit",
            # Without InvokeAI's cache of results, so that it makes the image.
            "nodes": {
                name: {"id": name, "use_cache": False, "is_intermediate": True, **n} for name, n in nodes.items()
            },
            "edges": [
                {"source": {"node_id": a, "field": b}, "destination": {"node_id": c, "field": d}}
                for (a, b), (c, d) in edges
            ],
        }


class ComfyUIClient(_HTTP):
    """ComfyUI's API: puts a graph of its own nodes into its queue. Supports checkpoints that contain all components.

    ComfyUI caches the output of each node as long as the node's inputs do not change. It would answer with an old image
    file, even if the model was damaged since. Therefore each request has a random word in the inputs of the text
    encoders, under a name that these nodes do not have. ComfyUI counts it as a change for them and for all nodes that
    follow, but no node reads it.

    The loaders do not change, because the audit tests the models that they hold. ``/free`` would load all models again
    and hide the fault. ComfyUI's history tells which nodes ran, and the audit checks it.
    """

    FRESH = frozenset({"positive", "negative", "sampler", "decode", "image"})
    """The nodes that must run for every image."""

    def models(self) -> list[str]:
        return self._choices("CheckpointLoaderSimple", "ckpt_name")

    def loras(self, model: str) -> list[str]:
        # The list does not give the adapters' bases.
        del model
        return self._choices("LoraLoader", "lora_name")

    def _choices(self, node: str, name: str) -> list[str]:
        known = self.get(f"/object_info/{node}")
        if node not in known:
            return []
        kind, *more = known[node]["input"]["required"][name]
        # The list of names itself. In ComfyUI's third schema the word COMBO comes first.
        return list(kind if isinstance(kind, list) else more[0]["options"])

    def make(self, request: ImageRequest) -> bytes:
        done = self._wait_for(self._enqueue(self._graph(request)))
        # Old versions have no status.
        status = done.get("status") or {}
        messages: dict[str, Any] = dict(status.get("messages") or [])
        if status.get("status_str") == "error":
            raise SafelightError(f"its job failed: {_failure(messages)}")
        cached = self.FRESH.intersection(messages.get("execution_cached", {}).get("nodes", []))
        if cached:
            raise SafelightError(f"not made again: the server used its cache of {', '.join(sorted(cached))}")
        images = done["outputs"].get("image", {}).get("images", [])
        if not images:
            raise SafelightError("its job ended without an image")
        where = {key: images[0][key] for key in ("filename", "subfolder", "type")}
        return self.data(f"/view?{httpx.QueryParams(where)}")

    def _enqueue(self, graph: dict[str, Any]) -> str:
        with self._transport_errors():
            answer = self.client.post("/prompt", json={"prompt": graph})
        if answer.status_code == 400:
            raise SafelightError(f"the server refused the graph: {_refusal(answer)[:400]}")
        return self._answer(lambda: answer).json()["prompt_id"]

    def _wait_for(self, job: str) -> dict[str, Any]:
        """Wait for the end of a job. Return its entry in the history, which ComfyUI writes at the job's end."""
        until = time.monotonic() + WAIT_SECONDS
        pause = 0.005
        while job not in (history := self.get(f"/history/{job}")):
            queue = self.get("/queue")
            running, pending = ([item[1] for item in queue[f"queue_{which}"]] for which in ("running", "pending"))
            if job not in running + pending and job not in self.get(f"/history/{job}"):
                raise SafelightError("its job is gone: somebody cleared the server's queue or history")
            if time.monotonic() > until:
                self._answer(lambda: self.client.post("/queue", json={"delete": [job]}))
                # Old versions ignore the id and interrupt the running job.
                if job in running:
                    self._answer(lambda: self.client.post("/interrupt", json={"prompt_id": job}))
                raise SafelightError(f"no image after {WAIT_SECONDS:.0f} s")
            time.sleep(pause := min(1.5 * pause, 0.5))
        return history[job]

    def _graph(self, request: ImageRequest) -> dict[str, Any]:
        size = {"width": request.size, "height": request.size, "batch_size": 1}
        word = uuid.uuid4().hex
        unet, clip = ["model", 0], ["model", 1]
        nodes: dict[str, tuple[str, dict[str, Any]]] = {
            "model": ("CheckpointLoaderSimple", {"ckpt_name": request.model}),
        }
        if request.lora:
            strengths = {"strength_model": 1.0, "strength_clip": 1.0}
            nodes["lora"] = ("LoraLoader", {"model": unet, "clip": clip, "lora_name": request.lora, **strengths})
            unet, clip = ["lora", 0], ["lora", 1]
        nodes |= {
            "positive": ("CLIPTextEncode", {"clip": clip, "text": request.prompt, "audit": word}),
            "negative": ("CLIPTextEncode", {"clip": clip, "text": "", "audit": word}),
            "latent": ("EmptyLatentImage", size),
            "sampler": (
                "KSampler",
                {
                    "model": unet,
                    "positive": ["positive", 0],
                    "negative": ["negative", 0],
                    "latent_image": ["latent", 0],
                    "seed": request.seed,
                    "steps": request.steps,
                    "cfg": 7.0,
                    "sampler_name": "euler",
                    "scheduler": "normal",
                    "denoise": 1.0,
                },
            ),
            "decode": ("VAEDecode", {"samples": ["sampler", 0], "vae": ["model", 2]}),
            # Not SaveImage, which would leave all images of the audit in the user's own folder.
            "image": ("PreviewImage", {"images": ["decode", 0]}),
        }
        return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def _refusal(answer: httpx.Response) -> str:
    """Return the errors of a graph: those of its nodes, else that of the whole graph."""
    try:
        body = answer.json()
        nodes = (body.get("node_errors") or {}).values()
        whole = [{"message": body["error"]["message"], "details": body["error"]["details"]}]
        found = [(node["class_type"], error) for node in nodes for error in node["errors"]]
        found = found or [("the graph", error) for error in whole]
        return "; ".join(f"{kind}: {error['message']}: {error['details']}" for kind, error in found)
    except (ValueError, KeyError, TypeError, AttributeError):
        return answer.text


def _failure(messages: dict[str, Any]) -> str:
    if "execution_interrupted" in messages:
        return "it was interrupted"
    error = messages.get("execution_error", {})
    return f"{error.get('node_type', 'a node')}: {str(error.get('exception_message', 'no reason is given')).strip()}"


APIS: Mapping[str, type[SafelightClient | A1111Client | OpenAIClient | InvokeAIClient | ComfyUIClient]] = {
    "safelight": SafelightClient,
    "a1111": A1111Client,
    "openai": OpenAIClient,
    "invoke": InvokeAIClient,
    "comfy": ComfyUIClient,
}
