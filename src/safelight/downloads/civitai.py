"""Finds the file of a model on Civitai, by its API.

Source: https://developer.civitai.com/docs/api/public-rest.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, cast

import httpx

from safelight.downloads.remote import Bundle, RemoteFile, checked_name
from safelight.errors import DownloadError
from safelight.files.json_values import json_list, json_object, json_objects
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
        about = _ask(source, client, f"/api/v1/models/{model}")
        versions = json_objects(about.get("modelVersions"))
        if not versions:
            raise DownloadError(source, "has no version that can be downloaded")
        chosen = versions[0]
    else:
        chosen = _ask(source, client, f"/api/v1/model-versions/{version}")
        about = json_object(chosen.get("model"))
    file = _file_of(source, json_objects(chosen.get("files")))
    name = checked_name(source, PurePosixPath(_text(source, file, "name")).name)
    url = _text(source, file, "downloadUrl")
    remote = RemoteFile(url, name, None, _sha256(file), _authorization_for(url))
    title = f"{about.get('name', 'a model')} {chosen.get('name', '')}".strip()
    preview = _preview(source, chosen, name)
    texts = {f"{PurePosixPath(name).stem}.civitai.info": json.dumps(chosen, indent=1, ensure_ascii=False)}
    called = readable(str(about.get("name") or chosen.get("modelId") or "model"))
    folder = f"civitai/{called}-{chosen.get('id', version or 0)}"
    return Bundle(title, folder, (remote, *preview), _notes(about, chosen), texts=texts)


def _file_of(source: str, files: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the file of a version: that of the model, or of a VAE if there is no other."""
    safe = [one for one in files if _format(one) == SAFE]
    models = [one for one in safe if one.get("type", "Model") in ("Model", "Pruned Model")]
    fitting = models or [one for one in safe if one.get("type") == "VAE"]
    if not fitting:
        kinds = ", ".join(sorted({_format(one) or "unknown" for one in files})) or "none"
        what = "no safetensors file of a model or a VAE" if safe else "no safetensors file"
        raise DownloadError(source, f"has {what} (its formats: {kinds})")
    return next((one for one in fitting if one.get("primary")), fitting[0])


def _text(source: str, file: Mapping[str, Any], key: str) -> str:
    found = file.get(key)
    if not isinstance(found, str) or not found:
        raise DownloadError(source, f"its answer has no {key!r} for the file")
    return found


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
    try:
        there, own = httpx.URL(url), httpx.URL(endpoint())
    except httpx.InvalidURL as error:
        raise DownloadError(url[:200], f"is no address ({error}), though {endpoint()} named it") from error
    same = (there.scheme, there.host, there.port) == (own.scheme, own.host, own.port)
    return _authorization() if same else {}


def _format(file: Mapping[str, Any]) -> str:
    return str(json_object(file.get("metadata")).get("format") or file.get("format") or "")


def _sha256(file: Mapping[str, Any]) -> str | None:
    found = json_object(file.get("hashes")).get("SHA256")
    return str(found).lower() if found else None


def _preview(source: str, version: Mapping[str, Any], name: str) -> list[RemoteFile]:
    """Return the first picture of a version. It is not needed."""
    for image in json_objects(version.get("images")):
        if image.get("type", "image") == "image" and image.get("url"):
            url = str(image["url"])
            suffix = re.search(r"\.(jpe?g|png|webp|avif)$", url.partition("?")[0].lower())
            preview = f"{PurePosixPath(name).stem}.preview{suffix[0] if suffix else '.jpeg'}"
            return [RemoteFile(url, checked_name(source, preview), optional=True)]
    return []


def _notes(about: Mapping[str, Any], version: Mapping[str, Any]) -> tuple[str, ...]:
    words = [str(one) for one in json_list(version.get("trainedWords"))]
    notes = [f"for {version['baseModel']}"] if version.get("baseModel") else []
    notes += [f"trigger words: {', '.join(words)}"] if words else []
    notes += [
        f"licence: {what}" if about[key] else f"licence: not: {what}"
        for key, what in _PERMISSIONS.items()
        if key in about
    ]
    return tuple(notes)
