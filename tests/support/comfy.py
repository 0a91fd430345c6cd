"""A stand-in for ComfyUI, correct or with faults: its queue, node cache, flags, history, validation and eight nodes.

It follows ComfyUI's ``main.py``, ``server.py``, ``execution.py`` and ``comfy_execution/caching.py``. Instead of models,
a hash of the recipe decides each picture.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from PIL import Image as PILImage

CHECKPOINTS = ["A.safetensors", "B.safetensors"]
LORAS = ["style.safetensors"]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a picture."""

    model: str
    lora: str
    positive: str
    negative: str
    seed: int
    steps: int
    size: int

    def png(self) -> bytes:
        offsets = hashlib.sha256(repr(self).encode()).digest()
        gradient = PILImage.radial_gradient("L").resize((self.size, self.size))
        bands = [gradient.point([(value + offset) % 256 for value in range(256)]) for offset in offsets[:3]]
        held = io.BytesIO()
        PILImage.merge("RGB", bands).save(held, "PNG")
        return held.getvalue()


@dataclass
class Weights:
    """The content of the machine's memory: all recipes sampled and texts encoded since it was last emptied."""

    sampled: list[Recipe] = field(default_factory=list[Recipe])
    encoded: list[str] = field(default_factory=list[str])

    def switches(self) -> int:
        return sum(one.model != two.model for one, two in zip(self.sampled, self.sampled[1:], strict=False))


def as_asked(_: Weights, recipe: Recipe) -> Recipe:
    return recipe


def last_model(weights: Weights, recipe: Recipe) -> Recipe:
    """The first image after a switch is by the previous model (STATE 15)."""
    return replace(recipe, model=weights.sampled[-2].model) if len(weights.sampled) > 1 else recipe


def lora_stays(weights: Weights, recipe: Recipe) -> Recipe:
    """The LoRA of an earlier image is still in the denoiser (STATE 08)."""
    used = [one.lora for one in weights.sampled if one.model == recipe.model and one.lora]
    return replace(recipe, lora=used[-1]) if used else recipe


def noise_after_switches(weights: Weights, recipe: Recipe) -> Recipe:
    return recipe if weights.switches() < 3 else replace(recipe, model="noise")


def never_the_same(weights: Weights, recipe: Recipe) -> Recipe:
    return replace(recipe, seed=len(weights.sampled))


def fails(weights: Weights, recipe: Recipe) -> Recipe:
    if len(weights.sampled) > 2:
        raise RuntimeError("CUDA error: out of luck\n")
    return recipe


@dataclass
class How:
    """The variant of ComfyUI.

    cache: ``classic``, ``ram`` (ComfyUI's present default, which evicts nothing while there is memory) or ``none``.
    silent: the history of a job without a client_id lacks cached images (before pull request 14939).
    strict: nodes ignore unknown inputs, so that these change nothing.
    third: the nodes have ComfyUI's third schema.
    encoder: a LoRA stays in the text encoder.
    drops: jobs vanish from the queue.
    slow: jobs never end.
    """

    sample: Callable[[Weights, Recipe], Recipe] = as_asked
    cache: str = "ram"
    silent: bool = False
    strict: bool = False
    third: bool = False
    encoder: bool = False
    drops: bool = False
    slow: bool = False


LEAST = {"width": 16, "height": 16, "batch_size": 1, "steps": 1}
SCHEMA: dict[str, dict[str, Any]] = {
    "CheckpointLoaderSimple": {"ckpt_name": CHECKPOINTS},
    "LoraLoader": {
        "model": "MODEL",
        "clip": "CLIP",
        "lora_name": LORAS,
        "strength_model": "FLOAT",
        "strength_clip": "FLOAT",
    },
    "CLIPTextEncode": {"text": "STRING", "clip": "CLIP"},
    "EmptyLatentImage": {"width": "INT", "height": "INT", "batch_size": "INT"},
    "KSampler": {
        "model": "MODEL",
        "seed": "INT",
        "steps": "INT",
        "cfg": "FLOAT",
        "sampler_name": ["euler", "heun"],
        "scheduler": ["normal", "karras"],
        "positive": "CONDITIONING",
        "negative": "CONDITIONING",
        "latent_image": "LATENT",
        "denoise": "FLOAT",
    },
    "VAEDecode": {"samples": "LATENT", "vae": "VAE"},
    "PreviewImage": {"images": "IMAGE"},
}


def is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def refused(graph: dict[str, Any]) -> dict[str, Any] | None:
    """Validate a graph like ``validate_prompt``. Returns the body of status 400, or None if the graph is valid.

    Unknown inputs are ignored.
    """
    nodes: dict[str, Any] = {}
    for name, node in graph.items():
        if node["class_type"] not in SCHEMA:
            message = f"Cannot execute because node {node['class_type']} does not exist."
            error = {"type": "invalid_prompt", "message": message, "details": f"Node ID '#{name}'", "extra_info": {}}
            return {"error": error, "node_errors": {}}
        errors: list[tuple[str, str, str]] = []
        for key, kind in SCHEMA[node["class_type"]].items():
            value = node["inputs"].get(key)
            if value is None:
                errors.append(("required_input_missing", "Required input is missing", key))
            elif isinstance(kind, list) and value not in kind:
                errors.append(("value_not_in_list", "Value not in list", f"{key}: '{value}' not in {kind}"))
            elif key in LEAST and value < LEAST[key]:
                errors.append(("value_smaller_than_min", f"Value {value} smaller than min of {LEAST[key]}", key))
        if errors:
            told = [{"type": what, "message": said, "details": more, "extra_info": {}} for what, said, more in errors]
            nodes[name] = {"errors": told, "dependent_outputs": ["image"], "class_type": node["class_type"]}
    if not nodes:
        return None
    every = [error for node in nodes.values() for error in node["errors"]]
    details = "\n".join(f"{error['message']}: {error['details']}" for error in every)
    kind = "prompt_outputs_failed_validation"
    error = {"type": kind, "message": "Prompt outputs failed validation", "details": details, "extra_info": {}}
    return {"error": error, "node_errors": nodes}


class Comfy:
    """The queue, its one worker, and their state."""

    def __init__(self, how: How) -> None:
        self.how = how
        self.changed = threading.Condition()
        self.pending: list[tuple[int, str, dict[str, Any]]] = []
        self.running: list[tuple[int, str, dict[str, Any]]] = []
        self.history: dict[str, Any] = {}
        self.flags: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.kept: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.weights = Weights()
        self.ran: list[str] = []
        self.interrupted = threading.Event()
        self.closed = False
        self.number = 0

    def work(self) -> None:
        """ComfyUI's ``prompt_worker``. It reads the flags after each job, and while there is none."""
        while True:
            with self.changed:
                while not (self.pending or self.flags or self.closed):
                    self.changed.wait()
                if self.closed:
                    return
                item = self.pending.pop(0) if self.pending else None
                self.running = [item] if item else []
            if item:
                told = self.execute(item[2])
                with self.changed:
                    self.running = []
                    if not self.how.drops:
                        self.history[item[1]] = {"prompt": item, **told}
            with self.changed:
                flags, self.flags = self.flags, {}
            free = flags.get("free_memory", False)
            if flags.get("unload_models", free):
                self.weights = Weights()
            if free:
                self.kept = {}

    def signature(self, graph: dict[str, Any], name: str) -> str:
        """The class and inputs of a node and of all nodes before it, without the nodes' names."""
        node = graph[name]
        known = SCHEMA[node["class_type"]]
        inputs = {
            key: [self.signature(graph, value[0]), value[1]] if is_link(value) else value
            for key, value in node["inputs"].items()
            if key in known or not self.how.strict
        }
        return json.dumps([node["class_type"], inputs], sort_keys=True)

    def execute(self, graph: dict[str, Any]) -> dict[str, Any]:
        self.interrupted.clear()
        keys = {name: self.signature(graph, name) for name in graph}
        if self.how.cache != "ram":
            self.kept = {key: kept for key, kept in self.kept.items() if key in keys.values()}
        if self.how.cache == "none":
            self.kept = {}
        cached = [name for name, key in keys.items() if key in self.kept]
        messages: list[tuple[str, Any]] = [("execution_start", {}), ("execution_cached", {"nodes": cached})]
        given: dict[str, tuple[Any, ...]] = {}
        outputs: dict[str, Any] = {}

        def give(name: str) -> tuple[Any, ...]:
            if name in given:
                return given[name]
            if keys[name] in self.kept:
                given[name], ui = self.kept[keys[name]]
                if ui and not self.how.silent:
                    outputs[name] = ui
                return given[name]
            node = graph[name]
            # Like ``get_input_data``: only known inputs.
            known = SCHEMA[node["class_type"]]
            links = {key: give(value[0])[value[1]] for key, value in node["inputs"].items() if is_link(value)}
            plain = {key: value for key, value in node["inputs"].items() if key in known and not is_link(value)}
            self.ran.append(name)
            try:
                given[name], ui = self.run(node["class_type"], **links, **plain)
            except RuntimeError as error:
                where = {"node_id": name, "node_type": node["class_type"]}
                what = {"exception_message": f"{error}\n", "exception_type": type(error).__name__, "traceback": []}
                messages.append(("execution_error", where | what))
                raise
            except InterruptedError:
                messages.append(("execution_interrupted", {"node_id": name, "node_type": node["class_type"]}))
                raise
            if ui:
                outputs[name] = ui
            self.kept[keys[name]] = (given[name], ui)
            return given[name]

        try:
            for name, node in graph.items():
                if node["class_type"] == "PreviewImage":
                    give(name)
        except (RuntimeError, InterruptedError):
            status = {"status_str": "error", "completed": False, "messages": messages}
        else:
            messages.append(("execution_success", {}))
            status = {"status_str": "success", "completed": True, "messages": messages}
        return {"outputs": outputs, "status": status, "meta": {}}

    def run(self, kind: str, **given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ui: dict[str, Any] = {}
        if kind == "CheckpointLoaderSimple":
            return ({"model": given["ckpt_name"], "lora": ""}, "", "vae"), ui
        if kind == "LoraLoader":
            return (given["model"] | {"lora": given["lora_name"]}, given["lora_name"]), ui
        if kind == "CLIPTextEncode":
            self.weights.encoded.append(given["clip"])
            before = next((lora for lora in self.weights.encoded if lora), "")
            return (f"{given['text']} by {before if self.how.encoder else given['clip']}",), ui
        if kind == "EmptyLatentImage":
            return (given["width"],), ui
        if kind == "KSampler":
            if self.how.slow and self.interrupted.wait(30):
                raise InterruptedError
            model = given["model"]
            told = (given["positive"], given["negative"], given["seed"], given["steps"], given["latent_image"])
            recipe = Recipe(model["model"], model["lora"], *told)
            self.weights.sampled.append(recipe)
            return (self.how.sample(self.weights, recipe),), ui
        if kind == "VAEDecode":
            return (given["samples"].png(),), ui
        name = f"ComfyUI_temp_abcde_{len(self.files) + 1:05}_.png"
        self.files[name] = given["images"]
        return (), {"images": [{"filename": name, "subfolder": "", "type": "temp"}]}

    def put(self, graph: dict[str, Any]) -> dict[str, Any]:
        with self.changed:
            job = str(uuid.uuid4())
            self.number += 1
            self.pending.append((self.number, job, graph))
            self.changed.notify()
            return {"prompt_id": job, "number": self.number, "node_errors": {}}

    def info(self, kind: str) -> dict[str, Any]:
        if kind not in SCHEMA:
            return {}
        required = {
            key: ["COMBO", {"options": choice}] if self.how.third and isinstance(choice, list) else [choice, {}]
            for key, choice in SCHEMA[kind].items()
        }
        return {kind: {"input": {"required": required}, "name": kind}}


@contextmanager
def comfy(how: How | None = None) -> Generator[tuple[str, Comfy]]:
    """Run a stand-in. Yields its address and its inner state."""
    inside = Comfy(how or How())

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # With Nagle's algorithm the body waits 40 ms for the acknowledgement of the HTTP header.
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            root, _, rest = asked.path[1:].partition("/")
            with inside.changed:
                if root == "object_info":
                    self.say(inside.info(rest))
                elif root == "queue":
                    self.say({"queue_running": inside.running, "queue_pending": inside.pending})
                elif root == "history":
                    self.say({rest: inside.history[rest]} if rest in inside.history else {})
                elif root == "view" and (query := parse_qs(asked.query))["type"] == ["temp"]:
                    data = inside.files.get(query["filename"][0])
                    self.send(200 if data else 404, data or b"", "image/png")
                else:
                    self.send(404, b"", "text/plain")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.path == "/prompt":
                wrong = refused(body["prompt"])
                self.say(wrong or inside.put(body["prompt"]), 400 if wrong else 200)
                return
            with inside.changed:
                if self.path == "/free":
                    # Set only true flags, so that free_memory alone unloads the models too.
                    inside.flags |= {key: True for key in ("unload_models", "free_memory") if body.get(key)}
                    inside.changed.notify()
                elif self.path == "/queue":
                    inside.pending = [item for item in inside.pending if item[1] not in body.get("delete", [])]
                elif self.path == "/interrupt" and any(item[1] == body.get("prompt_id") for item in inside.running):
                    inside.interrupted.set()
            self.send(200, b"", "text/plain")

        def say(self, body: Any, code: int = 200) -> None:
            self.send(code, json.dumps(body).encode(), "application/json")

        def send(self, code: int, data: bytes, kind: str) -> None:
            self.send_response(code)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    work = (lambda: made.serve_forever(0.02), inside.work)
    threads = [threading.Thread(target=run, daemon=True) for run in work]
    for thread in threads:
        thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_address[1]}", inside
    finally:
        with inside.changed:
            inside.closed = True
            inside.interrupted.set()
            inside.changed.notify()
        made.shutdown()
        made.server_close()
