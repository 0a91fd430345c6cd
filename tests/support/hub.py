"""Servers on loopback that answer as Hugging Face, as Civitai and as a hostile server do."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Site:
    """What a server has, and how it behaves.

    ``files``: by path.
    ``answers``: for other paths, a function that handles the request.
    ``cuts``: for each path, after how many bytes the connection ends; each is used once.
    ``seen``: the requests: method, path, headers.
    """

    files: dict[str, bytes] = field(default_factory=dict[str, bytes])
    answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    seen: list[tuple[str, str, Mapping[str, str]]] = field(default_factory=list)
    seconds_a_chunk: float = 0.0
    etags: bool = True
    url: str = ""

    @property
    def host(self) -> str:
        return self.url.removeprefix("http://")

    def ranges(self) -> list[str]:
        """Return the ranges that were asked for."""
        return [headers["range"] for _, _, headers in self.seen if "range" in headers]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (the base class names it so)
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def _handle(self) -> None:
        site, path = self.site, unquote(urlsplit(self.path).path)
        site.seen.append((self.command, self.path, {name.lower(): value for name, value in self.headers.items()}))
        if path in site.answers:
            site.answers[path](self)
        elif path in site.files:
            self._file(path, site.files[path])
        else:
            code = {"X_Error_Code": "RepoNotFound"} if path.startswith("/api/models/") else {}
            send_json(self, {"error": "not found"}, 404, **code)

    def _file(self, path: str, data: bytes) -> None:
        begin, status = 0, 200
        etag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        asked = self.headers.get("Range", "")
        if asked.startswith("bytes=") and self.headers.get("If-Range", etag) == etag:
            begin, status = int(asked.removeprefix("bytes=").partition("-")[0]), 206
            if begin >= len(data):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(data) - begin))
        if self.site.etags:
            self.send_header("ETag", etag)
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = self.site.cuts.get(path, [])
        end = min(len(data), begin + cuts.pop(0)) if cuts else len(data)
        for at in range(begin, end, 1 << 14):
            self.wfile.write(data[at : min(at + (1 << 14), end)])
            if self.site.seconds_a_chunk:
                time.sleep(self.site.seconds_a_chunk)
        if end < len(data):
            self.close_connection = True


def send_json(handler: BaseHTTPRequestHandler, value: object, status: int = 200, **headers: str) -> None:
    data = json.dumps(value).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    for name, text in headers.items():
        handler.send_header(name.replace("_", "-"), text)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def send_raw(handler: BaseHTTPRequestHandler, data: bytes, status: int = 200, **headers: str) -> None:
    """Answer with these bytes and headers, whatever they are."""
    handler.send_response(status)
    for name, text in headers.items():
        handler.send_header(name.replace("_", "-"), text)
    handler.send_header("Connection", "close")
    handler.end_headers()
    with contextlib.suppress(OSError):
        handler.wfile.write(data)
    handler.close_connection = True


@contextlib.contextmanager
def served(site: Site) -> Generator[Site]:
    handler = type("Handler", (_Handler,), {"site": site})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def add_repository(site: Site, name: str, files: Mapping[str, bytes], licence: str = "apache-2.0") -> None:
    """Let a site answer as the hub does for a repository."""
    listed = [
        {
            "rfilename": path,
            "size": len(data),
            "blobId": hashlib.sha1(data).hexdigest(),
            **({"lfs": _lfs(data)} if path.endswith((".safetensors", ".gguf", ".bin")) else {}),
        }
        for path, data in files.items()
    ]
    about = {
        "id": name,
        "modelId": name,
        "sha": SHA,
        "private": False,
        "gated": False,
        "tags": [],
        "downloads": 1,
        "likes": 0,
        "siblings": listed,
        "cardData": {"license": licence},
    }

    def answer(handler: BaseHTTPRequestHandler) -> None:
        send_json(handler, about)

    for path in (f"/api/models/{name}", f"/api/models/{name}/revision/main", f"/api/models/{name}/revision/v2"):
        site.answers[path] = answer
    site.answers[f"/api/models/{name}/revision/other"] = lambda handler: send_json(
        handler, {"error": "Invalid rev id: other"}, 404, X_Error_Code="RevisionNotFound"
    )
    for path, data in files.items():
        site.files[f"/{name}/resolve/{SHA}/{path}"] = data


def _lfs(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}


def add_gated(site: Site, name: str) -> None:
    for path in (f"/api/models/{name}", f"/api/models/{name}/revision/main"):
        site.answers[path] = lambda handler: send_json(handler, {"error": "gated"}, 403, X_Error_Code="GatedRepo")


def add_civitai(site: Site, model: int, version: int, data: bytes, /, **changes: Any) -> None:
    """Let a site answer as Civitai does for a model with one version."""
    path = f"/api/download/models/{version}"
    file: dict[str, Any] = {
        "name": "style.safetensors",
        "type": "Model",
        "primary": True,
        "sizeKB": len(data) / 1024,
        "metadata": {"format": "SafeTensor", "fp": "fp16"},
        "hashes": {"SHA256": hashlib.sha256(data).hexdigest().upper(), "AutoV2": "0123456789"},
        "downloadUrl": site.url + path,
    }
    file |= changes
    images = [{"type": "image", "url": f"{site.url}/preview.png"}]
    found: dict[str, Any] = {
        "id": version,
        "modelId": model,
        "name": "v2",
        "baseModel": "SD 1.5",
        "trainedWords": ["glow", "neon"],
        "files": [file],
        "images": images,
    }
    about = {"name": "国风 Style", "type": "LORA", "allowNoCredit": True, "allowDerivatives": False}
    site.answers[f"/api/v1/models/{model}"] = lambda handler: send_json(
        handler, {**about, "id": model, "modelVersions": [found]}
    )
    site.answers[f"/api/v1/model-versions/{version}"] = lambda handler: send_json(handler, {**found, "model": about})
    site.files[path] = data
    site.files["/preview.png"] = b"\x89PNG\r\n\x1a\n not really"


def query_of(path: str) -> dict[str, list[str]]:
    return parse_qs(urlsplit(path).query)
