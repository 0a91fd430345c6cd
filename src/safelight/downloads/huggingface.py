"""Finds the files of a repository on Hugging Face, with huggingface_hub and the tokens that it knows."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from safelight.downloads.remote import Bundle, RemoteFile, checked_name
from safelight.errors import DownloadError
from safelight.files.folder import INDICES

PUBLIC = "https://huggingface.co"

WEIGHTS = (".safetensors", ".gguf")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
SETTINGS = (".json", ".txt", ".model", ".jinja")

UNUSED = "safety_checker"
"""A component that looks at finished pictures; Safelight has none (1.2 GB)."""

_VARIANT = re.compile(r"\.(fp16|bf16|fp32|fp8|non_ema|ema)(?=[.-])")
"""diffusers' variants of a file: ``model.fp16.safetensors``, ``model.fp16-00001-of-00002.safetensors``."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


_VARIANT_NAME = re.compile(r"[A-Za-z0-9_-]{0,40}")
"""A variant becomes part of the folder's name."""


@dataclass(frozen=True, slots=True)
class Repository:
    """What to take from a repository.

    ``name``: ``OWNER/NAME``.
    ``revision``: a branch, a tag or a commit; "" for the main branch.
    ``path``: one file, "" for all that a model needs.
    ``variant``: of diffusers' files, such as fp16; "" for the files without one.
    """

    name: str
    revision: str = ""
    path: str = ""
    variant: str = ""


def endpoint() -> str:
    """Return the address of the hub: that of the variable that huggingface_hub reads, too."""
    return os.environ.get("HF_ENDPOINT", PUBLIC).rstrip("/")


def is_repository(text: str) -> bool:
    return _REPOSITORY.fullmatch(text) is not None


def find(source: str, wanted: Repository) -> Bundle:
    """Ask the hub for the files of a repository.

    ``source``: as the user wrote it, for errors.
    Raises DownloadError if there is no such repository or file, or if the hub does not show it to this account.
    """
    if not _VARIANT_NAME.fullmatch(wanted.variant):
        problem = f"the variant {wanted.variant[:80]!r} is none: it has letters, digits, - and _, such as fp16"
        raise DownloadError(source, problem)
    info = _info(source, wanted)
    listed = {one.rfilename: one for one in info.siblings or ()}
    names = [wanted.path] if wanted.path else choose(source, listed, wanted.variant)
    if wanted.path and wanted.path not in listed:
        near = ", ".join(sorted(name for name in listed if name.endswith(WEIGHTS))[:8])
        raise DownloadError(source, f"has no file {wanted.path}. It has {near or 'no weights'}")
    headers = _authorization()
    files = tuple(
        RemoteFile(
            f"{endpoint()}/{wanted.name}/resolve/{info.sha}/{quote(name)}",
            checked_name(source, name),
            listed[name].size,
            None if listed[name].lfs is None else listed[name].lfs.sha256,
            headers,
        )
        for name in names
    )
    licence = None if info.card_data is None else info.card_data.get("license")
    notes = (f"licence: {licence}",) if licence else ()
    # Another revision or variant does not replace files that a model in the library uses.
    kept = f"@{info.sha[:10]}" if wanted.revision not in ("", "main") else ""
    kept += f".{wanted.variant}" if wanted.variant else ""
    return Bundle(wanted.name, f"huggingface/{wanted.name}{kept}", files, notes)


def _info(source: str, wanted: Repository) -> Any:
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api = HfApi(endpoint=endpoint())
    page = f"{endpoint()}/{wanted.name}"
    try:
        info = api.model_info(wanted.name, revision=wanted.revision or None, files_metadata=True)
    except GatedRepoError as error:
        problem = f"its authors ask for your consent: open {page}, accept the licence, and run `hf auth login`"
        raise DownloadError(source, problem) from error
    except RevisionNotFoundError as error:
        raise DownloadError(source, f"{wanted.name} has no revision {wanted.revision}") from error
    except RepositoryNotFoundError as error:
        problem = f"there is no repository {wanted.name}, or this account may not see it (`hf auth login`)"
        raise DownloadError(source, problem) from error
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError) as error:
        raise DownloadError(source, f"{endpoint()} did not answer as the hub does ({error!s:.200})") from error
    return info


def _authorization() -> dict[str, str]:
    from huggingface_hub import get_token

    token = get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def choose(source: str, names: Iterable[str], variant: str = "") -> list[str]:
    """Return the files of a repository that a model needs.

    For a diffusers folder: the index, and of each component its settings and weights, not those of other variants or
    formats. For others: the only file with weights.
    Raises DownloadError if several files could be meant, or if there are only pickles.
    """
    listed = sorted(names)
    if not any(name in INDICES for name in listed):
        return [_only_file(source, listed)]
    by_folder: defaultdict[str, list[str]] = defaultdict(list)
    for name in listed:
        folder, _, _ = name.rpartition("/")
        by_folder[folder].append(name)
    chosen = [name for name in listed if name in INDICES]
    for folder, inner in sorted(by_folder.items()):
        if folder:
            chosen += _of_component(source, folder, inner, variant)
    return chosen


def _only_file(source: str, names: Sequence[str]) -> str:
    weights = [name for name in names if name.endswith(WEIGHTS)]
    if len(weights) == 1:
        return weights[0]
    if weights:
        shown = ", ".join(weights[:12]) + (", …" if len(weights) > 12 else "")
        raise DownloadError(source, f"has {len(weights)} files with weights: {shown}. Name one: {source}/FILE")
    pickles = [name for name in names if name.endswith(PICKLES)]
    only = f"only pickles ({', '.join(pickles[:3])}), which can run code when other programs open them"
    raise DownloadError(source, f"has {only if pickles else 'no file with weights'}")


def _of_component(source: str, folder: str, names: Sequence[str], variant: str) -> list[str]:
    """Return the files of one component: settings, and the weights of a variant."""
    if folder == UNUSED:
        return []
    weights = [name for name in names if name.endswith(WEIGHTS)]
    pickles = [name for name in names if name.endswith(PICKLES) and not name.rpartition("/")[2].startswith("openvino_")]
    if not weights and pickles:
        raise DownloadError(source, f"{folder}/ has only pickles, which can run code when other programs open them")
    own = [name for name in weights if _variant_of(name) == variant]
    if variant and not own:
        # As in diffusers, a component without the variant is taken without it.
        own, variant = [name for name in weights if not _variant_of(name)], ""
    if weights and not own:
        found = ", ".join(sorted({_variant_of(name) for name in weights}))
        raise DownloadError(source, f"{folder}/ has weights only as the variant {found}; say --file-variant")
    settings = [
        name for name in names if name.endswith(SETTINGS) and (".index." not in name or _variant_of(name) == variant)
    ]
    return sorted([*settings, *own])


def _variant_of(name: str) -> str:
    found = _VARIANT.search(name.rpartition("/")[2])
    return found[1] if found else ""
