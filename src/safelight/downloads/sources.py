"""Reads what a user names as a source, and asks the source for its files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import httpx

from safelight.downloads import civitai, huggingface
from safelight.downloads.catalogue import CatalogueFile, read_catalogue
from safelight.downloads.huggingface import PICKLES, WEIGHTS, Repository
from safelight.downloads.remote import Bundle, RemoteFile, checked_name
from safelight.errors import DownloadError

KINDS = (
    "a repository on Hugging Face (OWNER/NAME, OWNER/NAME/FILE, hf:OWNER/NAME@REVISION), a page of Hugging Face or of "
    "Civitai (civitai:MODEL or civitai:MODEL@VERSION), the https address of a file, or a name of `safelight models "
    "catalogue`"
)

_ON_HUB = re.compile(r"(?P<name>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<path>.+))?")
_HUB_PAGE = re.compile(r"/(?P<name>[^/]+/[^/]+)(/(tree|blob|resolve)/(?P<revision>[^/]+)(/(?P<path>.+))?)?/?")
_CIVITAI = re.compile(r"civitai:(?P<model>[0-9]{1,18})(@(?P<version>[0-9]{1,18}))?")
_CIVITAI_PAGE = re.compile(r"/models/(?P<model>[0-9]{1,18})(/.*)?")
_NUMBER = re.compile(r"[0-9]{1,18}")
_CIVITAI_FILE = re.compile(r"/api/download/models/(?P<version>[0-9]{1,18})")


@dataclass(frozen=True, slots=True)
class RepositoryChoice:
    """What to take from a source, besides what its name says.

    ``file``: one file of a repository.
    ``file_variant``: of diffusers' files, such as fp16.
    ``revision``: a branch, a tag or a commit of a repository.
    """

    file: str = ""
    file_variant: str = ""
    revision: str = ""


Find = Callable[[httpx.Client], Bundle]


@dataclass(frozen=True, slots=True)
class SourcePart:
    """What is downloaded from one place.

    ``find``: asks the place for its files.
    ``variant``: of a model that does not say it; "" for others.
    """

    find: Find
    variant: str = ""


def read_parts(source: str, choice: RepositoryChoice) -> list[SourcePart]:
    """Return the parts of what a user names: several for a bundle of the catalogue. Nothing is asked yet.

    Raises DownloadError as :func:`read` does.
    """
    rows = read_catalogue().find(source.strip())
    if not rows:
        return [SourcePart(read(source, choice))]
    if choice != RepositoryChoice():
        raise DownloadError(source, "is in the catalogue: --file, --file-variant and --revision are for repositories")
    return [SourcePart(_of_catalogue(row), row.variant) for row in rows]


def _of_catalogue(row: CatalogueFile) -> Find:
    """Return what asks for a row's files, and says what the catalogue knows of them."""
    ask = read(row.source, RepositoryChoice(file=row.file))

    def find(client: httpx.Client) -> Bundle:
        try:
            bundle = ask(client)
        except DownloadError as error:
            todo = f". {row.todo}" if row.todo else ""
            raise DownloadError(row.name, f"{error}{todo} (the catalogue has it from {row.cite})") from error
        notes = [one for one in (row.todo, _other_content(row, bundle)) if one]
        if row.license and not any(one.startswith("licence: ") for one in bundle.notes):
            notes.append(f"licence: {row.license}")
        return replace(bundle, notes=(*bundle.notes, *notes))

    return find


def _other_content(row: CatalogueFile, bundle: Bundle) -> str:
    """Return a note if the source has another file now than when the catalogue was written."""
    if len(bundle.files) != 1:
        return ""
    [file] = bundle.files
    if row.sha256 and file.sha256 and row.sha256 != file.sha256:
        return f"the source replaced this file since the catalogue was written: its SHA-256 was {row.sha256[:16]}…"
    return ""


def read(source: str, choice: RepositoryChoice) -> Find:
    """Return the function that asks a source for its files. Nothing is asked yet.

    Raises DownloadError for a text that is no source, and for a choice that the source does not have.
    """
    text = source.strip()
    if found := _CIVITAI.fullmatch(text):
        version = int(found["version"]) if found["version"] else None
        return _on_civitai(source, choice, int(found["model"]), version)
    if "://" in text:
        return _address(source, text, choice)
    on_hub = _ON_HUB.fullmatch(text.removeprefix("hf:"))
    if on_hub is None or not huggingface.is_repository(on_hub["name"]):
        raise DownloadError(source, f"is no source. It must be {KINDS}")
    return _on_hub(source, choice, on_hub)


def _address(source: str, text: str, choice: RepositoryChoice) -> Find:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise DownloadError(source, f"is no address ({error})") from error
    if url.userinfo:
        raise DownloadError(source, "has a name and a password in its address; tokens come from their own variables")
    if url.host == httpx.URL(huggingface.endpoint()).host and (page := _HUB_PAGE.fullmatch(url.path)):
        return _on_hub(source, choice, page)
    if url.host == httpx.URL(civitai.endpoint()).host:
        version = url.params.get("modelVersionId", "")
        if file := _CIVITAI_FILE.fullmatch(url.path):
            return _on_civitai(source, choice, None, int(file["version"]))
        if page := _CIVITAI_PAGE.fullmatch(url.path):
            if version and not _NUMBER.fullmatch(version):
                raise DownloadError(source, f"has the modelVersionId {version[:40]!r}, which is no number")
            return _on_civitai(source, choice, int(page["model"]), int(version) if version else None)
    if choice != RepositoryChoice():
        raise DownloadError(source, "is one file: --file, --file-variant and --revision are for repositories")
    return lambda client: _one_file(source, client, url)


def _on_hub(source: str, choice: RepositoryChoice, found: re.Match[str]) -> Find:
    path, revision = found["path"] or "", found["revision"] or ""
    for name, said, chosen in (("--file", path, choice.file), ("--revision", revision, choice.revision)):
        if said and chosen and said != chosen:
            raise DownloadError(source, f"says {said}, and {name} {chosen}; leave one out")
    wanted = Repository(found["name"], revision or choice.revision, path or choice.file, choice.file_variant)
    return lambda _: huggingface.find(source, wanted)


def _on_civitai(source: str, choice: RepositoryChoice, model: int | None, version: int | None) -> Find:
    if choice != RepositoryChoice():
        raise DownloadError(source, "--file, --file-variant and --revision are for repositories; name a version")
    return lambda client: civitai.find(source, client, model, version)


def _one_file(source: str, client: httpx.Client, url: httpx.URL) -> Bundle:
    name = PurePosixPath(url.path).name
    if not name.lower().endswith(WEIGHTS):
        name = _announced_name(source, client, url) or name
    if name.lower().endswith(PICKLES):
        raise DownloadError(source, f"{name} is a pickle by its name, which can run code when other programs open it")
    if not name.lower().endswith(WEIGHTS):
        raise DownloadError(source, f"{name or 'it'} is no {' or '.join(WEIGHTS)} file by its name")
    # Two addresses may end in the same name.
    mark = hashlib.sha256(str(url.copy_with(query=None)).encode()).hexdigest()[:10]
    return Bundle(name, f"files/{mark}", (RemoteFile(str(url), checked_name(source, name)),))


def _announced_name(source: str, client: httpx.Client, url: httpx.URL) -> str:
    """Return the name that a server gives to a file (``Content-Disposition``); "" if it gives none."""
    try:
        response = client.head(url)
    except httpx.HTTPError as error:
        raise DownloadError(source, f"did not answer ({error or type(error).__name__})") from error
    found = re.search(r'filename="?([^";]+)', response.headers.get("Content-Disposition", ""))
    return PurePosixPath(found[1].strip().replace("\\", "/")).name if found else ""
