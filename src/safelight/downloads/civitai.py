"""Finds the file of a model on Civitai, by its API.

Source: https://developer.civitai.com/docs/api/public-rest.
"""

from __future__ import annotations

import json
import os
from pathlib import PurePosixPath
from typing import Any, cast

import httpx

from safelight.downloads.remote import Bundle, RemoteFile, checked_name
from safelight.errors import DownloadError
from safelight.names import readable

PUBLIC = "https://civitai.com"

TOKEN = "CIVITAI_API_TOKEN"
"""The variable with the token of an account (https://civitai.com/user/account)."""

SAFE = "SafeTensor"

_PERMISSIONS = {
    "allowNoCredit": "may be used without naming its author",
    "allowDerivatives": "may be merged and shared",
}


def endpoint() -> str:
    """Return the address of Civitai, or of a server that answers as it does (``CIVITAI_ENDPOINT``)."""
    return os.environ.get("CIVITAI_ENDPOINT", PUBLIC).rstrip("/")


def find(source: str, client: httpx.Client, model: int | None, version: int | None) -> Bundle:
    """Ask Civitai for the file of a version.

    ``source``: as the user wrote it, for errors.
    ``model``, ``version``: their numbers; the newest version if only the model is known.
    Raises DownloadError if there is none, or if it has no safetensors file.
    """
    if version is None:
        found = _ask(source, client, f"/api/v1/models/{model}")
        versions = cast("list[dict[str, Any]]", found.get("modelVersions") or [])
        if not versions:
            raise DownloadError(source, "has no version that can be downloaded")
        chosen, about = versions[0], found
    else:
        chosen = _ask(source, client, f"/api/v1/model-versions/{version}")
        about = cast("dict[str, Any]", chosen.get("model") or {})
    files = cast("list[dict[str, Any]]", chosen.get("files") or [])
    safe = [
        one for one in files if _format(one) == SAFE and one.get("type", "Model") in ("Model", "Pruned Model", "VAE")
    ]
    if not safe:
        kinds = ", ".join(sorted({_format(one) or "unknown" for one in files})) or "none"
        raise DownloadError(source, f"has no safetensors file (its formats: {kinds})")
    file = next((one for one in safe if one.get("primary")), safe[0])
    try:
        name = checked_name(source, PurePosixPath(str(file["name"])).name)
        remote = RemoteFile(
            str(file["downloadUrl"]), name, None, _sha256(file), _authorization_for(str(file["downloadUrl"]))
        )
    except KeyError as error:
        raise DownloadError(source, f"its answer lacks {error}") from error
    title = f"{about.get('name', 'a model')} {chosen.get('name', '')}".strip()
    preview = _preview(source, chosen, name)
    texts = {f"{PurePosixPath(name).stem}.civitai.info": json.dumps(chosen, indent=1, ensure_ascii=False)}
    called = readable(str(about.get("name") or chosen.get("modelId") or "model"))
    folder = f"civitai/{called}-{chosen.get('id', version or 0)}"
    return Bundle(title, folder, (remote, *preview), _notes(about, chosen), texts=texts)


def _ask(source: str, client: httpx.Client, path: str) -> dict[str, Any]:
    try:
        response = client.get(endpoint() + path, headers=_authorization())
    except httpx.HTTPError as error:
        raise DownloadError(source, f"{endpoint()} did not answer ({error or type(error).__name__})") from error
    if response.status_code in (401, 403):
        raise DownloadError(source, f"needs an account: put its token into the variable {TOKEN}")
    if response.status_code == 404:
        raise DownloadError(source, "Civitai has no such model or version")
    try:
        found = response.json() if response.status_code == 200 else None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise DownloadError(source, f"{endpoint()} did not answer as Civitai does (status {response.status_code})")
    return cast("dict[str, Any]", found)


def _authorization() -> dict[str, str]:
    token = os.environ.get(TOKEN)
    return {"Authorization": f"Bearer {token}"} if token else {}


def _authorization_for(url: str) -> dict[str, str]:
    """Return the token only for Civitai itself: its answer may name another host."""
    there, own = httpx.URL(url), httpx.URL(endpoint())
    same = (there.scheme, there.host, there.port) == (own.scheme, own.host, own.port)
    return _authorization() if same else {}


def _format(file: dict[str, Any]) -> str:
    metadata = file.get("metadata")
    found = cast("dict[str, Any]", metadata).get("format") if isinstance(metadata, dict) else None
    return str(found or file.get("format") or "")


def _sha256(file: dict[str, Any]) -> str | None:
    hashes = file.get("hashes")
    found = cast("dict[str, Any]", hashes).get("SHA256") if isinstance(hashes, dict) else None
    return str(found).lower() if found else None


def _preview(source: str, version: dict[str, Any], name: str) -> list[RemoteFile]:
    """Return the first picture of a version. It is not needed."""
    for image in cast("list[dict[str, Any]]", version.get("images") or []):
        if image.get("type", "image") == "image" and image.get("url"):
            suffix = PurePosixPath(httpx.URL(str(image["url"])).path).suffix or ".jpeg"
            preview = checked_name(source, f"{PurePosixPath(name).stem}.preview{suffix}")
            return [RemoteFile(str(image["url"]), preview, optional=True)]
    return []


def _notes(about: dict[str, Any], version: dict[str, Any]) -> tuple[str, ...]:
    words = cast("list[str]", version.get("trainedWords") or [])
    notes = [f"for {version['baseModel']}"] if version.get("baseModel") else []
    notes += [f"trigger words: {', '.join(words)}"] if words else []
    notes += [
        f"licence: {what}" if about[key] else f"licence: not: {what}"
        for key, what in _PERMISSIONS.items()
        if key in about
    ]
    return tuple(notes)
