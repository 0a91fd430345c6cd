"""Downloads from servers on loopback: right files are added, interrupted ones go on, and wrong ones are refused."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Generator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import httpx
import pytest
from support import hub
from support.hub import Site, send_raw, served
from support.scale import times

from safelight.downloads import civitai, connection, fetch, huggingface, sources
from safelight.downloads.connection import open_client
from safelight.downloads.download import DownloadProgress, download
from safelight.downloads.remote import Bundle, RemoteFile, checked_name
from safelight.downloads.sources import RepositoryChoice
from safelight.errors import Cancelled, DownloadError, StorageError

DATA = random.Random(4).randbytes(700_000)
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Generator[Site]:
    monkeypatch.setattr(fetch, "WAIT_SECONDS", 0.001)
    for name in (*connection.PROXIES, "HF_TOKEN", "CIVITAI_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with served(Site()) as site:
        monkeypatch.setenv("HF_ENDPOINT", site.url)
        monkeypatch.setenv("CIVITAI_ENDPOINT", site.url)
        yield site


@pytest.fixture
def client(site: Site) -> Generator[httpx.Client]:
    with open_client([site.host]) as client:
        yield client


def bundle_of(site: Site, nbytes: int | None = len(DATA), sha256: str | None = DIGEST) -> Bundle:
    return Bundle(
        "a model", "some", (RemoteFile(f"{site.url}/model.safetensors", "model.safetensors", nbytes, sha256),)
    )


def nothing(_: DownloadProgress) -> None:
    pass


def test_a_file_arrives_with_progress(site: Site, client: httpx.Client, tmp_path: Path) -> None:
    site.files["/model.safetensors"] = DATA
    seen: list[DownloadProgress] = []
    [path] = download(bundle_of(site), tmp_path, client, seen.append)
    assert path.read_bytes() == DATA
    assert (seen[-1].done, seen[-1].total) == (len(DATA), len(DATA))
    assert [one.done for one in seen] == sorted(one.done for one in seen)
    assert sorted(one.name for one in path.parent.iterdir()) == [
        ".download.lock",
        ".downloaded.json",
        "model.safetensors",
    ]
    # Once more: nothing is asked.
    asked = len(site.seen)
    download(bundle_of(site), tmp_path, client, seen.append)
    assert len(site.seen) == asked


def test_other_content_does_not_replace_a_file_that_a_model_may_use(
    site: Site, client: httpx.Client, tmp_path: Path
) -> None:
    site.files["/model.safetensors"] = DATA
    [first] = download(bundle_of(site), tmp_path, client, nothing)
    newer = DATA[:-1] + bytes([DATA[-1] ^ 1])
    site.files["/model.safetensors"] = newer
    for _ in range(2):
        [second] = download(bundle_of(site, sha256=hashlib.sha256(newer).hexdigest()), tmp_path, client, nothing)
    assert (first.read_bytes(), second.read_bytes()) == (DATA, newer)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    # One that is damaged is replaced.
    first.write_bytes(DATA[:-1])
    site.files["/model.safetensors"] = DATA
    assert download(bundle_of(site), tmp_path, client, nothing) == [first]
    assert first.read_bytes() == DATA


def test_connections_that_end_early_go_on(site: Site, client: httpx.Client, tmp_path: Path) -> None:
    site.files["/model.safetensors"] = DATA
    site.cuts["/model.safetensors"] = [100_000, 0, 250_000, 1]
    [path] = download(bundle_of(site), tmp_path, client, nothing)
    assert path.read_bytes() == DATA
    assert site.ranges()[0] == "bytes=100000-"
    assert len(site.ranges()) == 4


@pytest.mark.parametrize("knows_hash", [True, False])
def test_stopped_at_random_moments_and_resumed(
    knows_hash: bool, site: Site, client: httpx.Client, tmp_path: Path
) -> None:
    site.files["/model.safetensors"] = DATA
    wanted = bundle_of(site) if knows_hash else bundle_of(site, None, None)
    chance, stops = random.Random(7), 0
    for _ in range(times(20, 60)):
        limit = chance.randrange(len(DATA))

        def stop(now: DownloadProgress, limit: int = limit) -> None:
            if now.done > limit:
                raise Cancelled("stopped")

        try:
            download(wanted, tmp_path, client, stop)
        except Cancelled:
            stops += 1
        else:
            break
    assert stops > 5
    [path] = download(wanted, tmp_path, client, nothing)
    assert path.read_bytes() == DATA
    assert site.ranges()


def test_a_file_that_changes_between_two_ranges_is_fetched_again(
    site: Site, client: httpx.Client, tmp_path: Path
) -> None:
    site.files["/model.safetensors"] = DATA
    site.cuts["/model.safetensors"] = [300_000]
    other = DATA[::-1]

    def change(now: DownloadProgress) -> None:
        if now.done > 200_000:
            site.files["/model.safetensors"] = other

    [path] = download(bundle_of(site, None, None), tmp_path, client, change)
    assert path.read_bytes() == other


def test_a_server_that_ignores_if_range_is_caught(site: Site, client: httpx.Client, tmp_path: Path) -> None:
    """It sends a range of another file, with that file's mark."""
    site.files["/model.safetensors"] = DATA
    site.cuts["/model.safetensors"] = [300_000]
    other = DATA[::-1]
    [calls] = [[0]]

    def answer(handler: BaseHTTPRequestHandler) -> None:
        calls[0] += 1
        begin = int(handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if calls[0] == 1:
            send_raw(handler, DATA[:300_000], Content_Length=str(len(DATA)), ETag='"one"')
        elif begin:
            headers = {"Content_Range": f"bytes {begin}-{len(other) - 1}/{len(other)}"}
            send_raw(handler, other[begin:], 206, Content_Length=str(len(other) - begin), ETag='"two"', **headers)
        else:
            send_raw(handler, other, Content_Length=str(len(other)), ETag='"two"')

    site.answers["/model.safetensors"] = answer
    [path] = download(bundle_of(site, None, None), tmp_path, client, nothing)
    assert path.read_bytes() == other


def raw(data: bytes, status: int = 200, **headers: str) -> Callable[[Site], None]:
    def put(site: Site) -> None:
        site.answers["/model.safetensors"] = lambda handler: send_raw(handler, data, status, **headers)

    return put


def file(data: bytes) -> Callable[[Site], None]:
    return lambda site: site.files.update({"/model.safetensors": data})


HOSTILE: dict[str, Callable[[Site], None]] = {
    "says 700000": file(DATA[:-1]),
    "has the SHA-256": file(DATA[::-1]),
    "ended after 1000 bytes, 5 times": raw(DATA[:1000], Content_Length="700000"),
    "sends more than the 700000 bytes": raw(DATA + b"more"),
    "ended after 5 bytes, 5 times": raw(b"a few"),
    "is a web page": raw(b"<!DOCTYPE html><title>Log in</title>" + b" " * (len(DATA) - 36)),
    "is a Git LFS pointer": raw(b"version https://git-lfs.github.com/spec/v1" + b" " * (len(DATA) - 42)),
    "is a pickle": raw(b"PK\x03\x04" + bytes(len(DATA) - 4)),
    "needs an account or a token": raw(b"", 401),
    "accept its licence on its page": raw(b"", 403),
    r"is not there \(the server answered 404\)": raw(b"", 404),
    "the server answered 503": raw(b"", 503),
    "cannot be had": raw(b"", 418),
    "which is not public": raw(b"", 302, Location="https://127.0.0.2/model.safetensors", Content_Length="0"),
    "Only https is allowed": raw(b"", 302, Location="http://example.org/model.safetensors", Content_Length="0"),
    "10.0.0.1, which is not public": raw(b"", 302, Location="https://10.0.0.1/x", Content_Length="0"),
}


@pytest.mark.parametrize("says", HOSTILE)
def test_hostile_answers_end_in_their_own_errors(says: str, site: Site, client: httpx.Client, tmp_path: Path) -> None:
    HOSTILE[says](site)
    # A file that is no model is said to be none, also where nothing says which hash it should have.
    whole = bundle_of(site, len(DATA), None if says.startswith("is a ") else DIGEST)
    with pytest.raises(DownloadError, match=says):
        download(whole, tmp_path, client, nothing)
    assert not (tmp_path / "some/model.safetensors").exists()


def test_endless_redirects_end(site: Site, client: httpx.Client, tmp_path: Path) -> None:
    raw(b"", 302, Location=f"{site.url}/model.safetensors", Content_Length="0")(site)
    with pytest.raises(DownloadError, match="leads in a circle"):
        download(bundle_of(site), tmp_path, client, nothing)


PRIVATE = ["127.0.0.1", "10.1.2.3", "192.168.0.9", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1", "[::1]"]
PRIVATE += [
    "[64:ff9b::7f00:1]",
    "[fec0::1]",
    "192.0.0.9",
    "[3fff::1]",
    "[fe80::1]",
    "[fd00::1]",
    "[::ffff:127.0.0.1]",
    "[2002:7f00:1::]",
    "localhost",
]


@pytest.mark.parametrize("host", PRIVATE)
def test_private_addresses_are_refused(host: str, tmp_path: Path, site: Site) -> None:
    with open_client() as client, pytest.raises(DownloadError, match="not public"):
        client.get(f"https://{host}/model.safetensors")


def test_the_address_that_is_connected_to_is_the_one_that_was_checked(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that has a public address first and a private one then is looked up once."""
    answers = iter(["93.184.216.34", "127.0.0.1"])
    looked_up: list[str] = []

    def resolve(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        looked_up.append(host)
        return [(2, 1, 6, "", (next(answers), 443))]

    connected: list[str] = []

    def connect(self: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        connected.append(request.url.host)
        assert request.headers["Host"] == "rebinding.example"
        assert request.extensions["sni_hostname"] == "rebinding.example"
        return httpx.Response(200, text="it")

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", connect)
    with open_client() as client:
        client.get("https://rebinding.example/x")
    assert (looked_up, connected) == (["rebinding.example"], ["93.184.216.34"])


def test_a_disk_that_is_too_small_is_said_before_anything_is_asked(
    site: Site, client: httpx.Client, tmp_path: Path
) -> None:
    huge = Bundle("a model", "some", (RemoteFile(f"{site.url}/model.safetensors", "model.safetensors", 10**18),))
    with pytest.raises(StorageError, match="GB free, and a model needs"):
        download(huge, tmp_path, client, nothing)
    assert not site.seen
    raw(b"", Content_Length=str(10**18))(site)
    with pytest.raises(StorageError, match="the download needs"):
        download(bundle_of(site, None, None), tmp_path, client, nothing)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a//b", "a/./b", "a\\b", "", "C:/x", "a\nb", "x" * 300])
def test_names_that_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(DownloadError, match="not a path within a folder"):
        checked_name("hub", name)


DIFFUSERS = [
    "README.md",
    "model.safetensors",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]


TWICE = {
    "README.md",
    "model.safetensors",
    "text_encoder/pytorch_model.bin",
    "text_encoder/model.fp16.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
}
WITH_FP16 = {"text_encoder/model.safetensors", *(name for name in DIFFUSERS if "0000" in name or ".index." in name)}


def test_a_diffusers_folder_is_taken_without_what_it_has_twice() -> None:
    assert huggingface.choose("x", DIFFUSERS) == sorted(set(DIFFUSERS) - TWICE)
    half = {name for name in TWICE if "fp16" in name}
    assert huggingface.choose("x", DIFFUSERS, "fp16") == sorted((set(DIFFUSERS) - TWICE - WITH_FP16) | half)


def test_what_safelight_does_not_use_is_left_out() -> None:
    more = ["safety_checker/pytorch_model.bin", "vae_encoder/openvino_model.bin", "vae_encoder/openvino_model.xml"]
    assert huggingface.choose("x", [*DIFFUSERS, *more]) == sorted(set(DIFFUSERS) - TWICE)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a.safetensors", "b.gguf"], "has 2 files with weights: a.safetensors, b.gguf"),
        (["a.ckpt"], r"only pickles \(a.ckpt\)"),
        (["README.md"], "no file with weights"),
        (["model_index.json", "unet/model.bin", "unet/openvino_model.bin"], "unet/ has only pickles"),
        (["model_index.json", "unet/model.fp16.safetensors"], "only as the variant fp16; say --file-variant"),
    ],
)
def test_repositories_that_leave_a_question_say_so(names: list[str], says: str) -> None:
    with pytest.raises(DownloadError, match=says):
        huggingface.choose("x", names)


@pytest.mark.parametrize("variant", ["/../../../outside", "..", "a/b", "a b", "é"])
def test_a_variant_leads_to_no_other_folder(variant: str, site: Site, client: httpx.Client, tmp_path: Path) -> None:
    hub.add_repository(site, "me/tiny", {"authorized_keys": DATA})
    choice = RepositoryChoice("authorized_keys", variant)
    with pytest.raises(DownloadError, match=r"the variant .* is none"):
        sources.read("me/tiny", choice)(client)
    folders = Bundle("a model", f"huggingface/me/tiny.{variant}", ())
    if "/.." in variant:
        with pytest.raises(DownloadError, match="not a path within a folder"):
            download(folders, tmp_path / "in", client, nothing)
    assert not list(tmp_path.rglob("*outside*"))
    assert not (tmp_path / "in").exists()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("a word", "is no source"),
        ("", "is no source"),
        ("https://user:secret@example.org/x.safetensors", "a name and a password"),
        ("hf:a/b@one/file", "is one file|says one"),
        ("civitai:12", "name a version"),
        ("https://civitai.com/models/12?modelVersionId=²", "is no number"),
        ("civitai:１２", "is no source"),
    ],
)
def test_texts_that_are_no_sources(source: str, says: str) -> None:
    with pytest.raises(DownloadError, match=says):
        sources.read(source, RepositoryChoice(revision="two"))


def test_pages_of_the_hub_and_short_names_mean_the_same(site: Site, client: httpx.Client) -> None:
    hub.add_repository(site, "me/tiny", {"tiny.safetensors": DATA})
    texts = ["me/tiny", "hf:me/tiny", "hf:me/tiny@main", "me/tiny/tiny.safetensors", f"{site.url}/me/tiny"]
    texts += [f"{site.url}/me/tiny/tree/main", f"{site.url}/me/tiny/blob/main/tiny.safetensors"]
    found = [sources.read(text, RepositoryChoice())(client) for text in texts]
    assert all(one.files == found[0].files for one in found)
    [only] = found[0].files
    assert (only.name, only.nbytes, only.sha256) == ("tiny.safetensors", len(DATA), DIGEST)
    assert found[0].notes == ("licence: apache-2.0",)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("me/absent", "there is no repository me/absent, or this account may not see it"),
        ("me/gated", "open .*/me/gated, accept the licence, and run `hf auth login`"),
        ("me/tiny@other", "has no revision other"),
        ("me/tiny/other.safetensors", "has no file other.safetensors. It has tiny.safetensors"),
    ],
)
def test_what_the_hub_refuses_is_explained(source: str, says: str, site: Site, client: httpx.Client) -> None:
    hub.add_repository(site, "me/tiny", {"tiny.safetensors": DATA})
    hub.add_gated(site, "me/gated")
    with pytest.raises(DownloadError, match=says):
        sources.read(source, RepositoryChoice())(client)


def test_the_token_goes_to_the_hub_and_to_nobody_else(
    site: Site, client: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.add_repository(site, "me/tiny", {"tiny.safetensors": DATA})
    with served(Site(files={"/elsewhere": DATA})) as other:
        site.answers[f"/me/tiny/resolve/{hub.SHA}/tiny.safetensors"] = lambda handler: send_raw(
            handler, b"", 302, Location=f"{other.url}/elsewhere", Content_Length="0"
        )
        with open_client([site.host, other.host]) as both:
            download(sources.read("me/tiny", RepositoryChoice())(both), tmp_path, both, nothing)
        assert {headers.get("authorization") for _, _, headers in site.seen} == {"Bearer hf_secret"}
        assert all("authorization" not in headers for _, _, headers in other.seen)


@pytest.mark.parametrize("source", ["civitai:12", "civitai:12@34", "{url}/models/12/style?modelVersionId=34"])
def test_civitai(source: str, site: Site, client: httpx.Client, tmp_path: Path) -> None:
    hub.add_civitai(site, 12, 34, DATA)
    found = sources.read(source.format(url=site.url), RepositoryChoice())(client)
    assert "trigger words: glow, neon" in found.notes
    assert "licence: not: may be merged and shared" in found.notes
    [path] = download(found, tmp_path, client, nothing)
    assert path.read_bytes() == DATA
    assert {one.name for one in path.parent.iterdir() if not one.name.startswith(".")} == {
        "style.safetensors",
        "style.civitai.info",
        "style.preview.png",
    }


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"metadata": {"format": "PickleTensor"}}, r"has no safetensors file \(its formats: PickleTensor\)"),
        ({"hashes": {"SHA256": "0" * 64}}, "has the SHA-256"),
        ({"name": "../../x.safetensors"}, ""),
        ({"name": None}, "no 'name' for the file"),
        ({"downloadUrl": ["x"]}, "no 'downloadUrl' for the file"),
        ({"hashes": "none", "type": "Config"}, "no safetensors file of a model or a VAE"),
    ],
)
def test_civitais_lies(changes: dict[str, object], says: str, site: Site, client: httpx.Client, tmp_path: Path) -> None:
    hub.add_civitai(site, 12, 34, DATA, **changes)
    if not says:
        # Only the last part of the name counts.
        [path] = download(sources.read("civitai:12", RepositoryChoice())(client), tmp_path, client, nothing)
        assert path.parent.is_relative_to(tmp_path / "civitai")
        return
    with pytest.raises(DownloadError, match=says):
        download(sources.read("civitai:12", RepositoryChoice())(client), tmp_path, client, nothing)


def test_civitais_model_comes_before_its_vae(site: Site, client: httpx.Client) -> None:
    hub.add_civitai(site, 12, 34, DATA)
    found = sources.read("civitai:12", RepositoryChoice())(client)
    files = [
        {
            "name": "v.safetensors",
            "type": "VAE",
            "primary": True,
            "downloadUrl": "x",
            "metadata": {"format": "SafeTensor"},
        },
        {"name": "m.safetensors", "type": "Model", "downloadUrl": "y", "metadata": {"format": "SafeTensor"}},
    ]
    assert found.files
    assert civitai._file_of("x", files)["name"] == "m.safetensors"
    assert civitai._file_of("x", files[:1])["name"] == "v.safetensors"


def test_a_preview_that_never_ends_is_given_up(
    site: Site, client: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "MOST_OPTIONAL_BYTES", 100_000)
    hub.add_civitai(site, 12, 34, DATA)
    wanted = sources.read("civitai:12", RepositoryChoice())(client)
    [preview] = [one for one in wanted.files if one.optional]
    for known in (True, False):
        headers = {"Content_Length": "200000"} if known else {}
        site.answers[httpx.URL(preview.url).path] = lambda handler, headers=headers: send_raw(
            handler, bytes(200_000), **headers
        )
        [path] = download(wanted, tmp_path, client, nothing)
        assert path.read_bytes() == DATA
        assert not [one for one in path.parent.iterdir() if "preview" in one.name]


def test_a_caller_can_stop_while_a_preview_is_slow(site: Site, client: httpx.Client, tmp_path: Path) -> None:
    hub.add_civitai(site, 12, 34, DATA)
    wanted = sources.read("civitai:12", RepositoryChoice())(client)
    ended, calls = threading.Event(), [0]

    def slow(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not ended.wait(0.01):
            try:
                handler.wfile.write(bytes(100))
            except OSError:
                return

    [preview] = [one for one in wanted.files if one.optional]
    site.answers[httpx.URL(preview.url).path] = slow

    def stop_later(now: DownloadProgress) -> None:
        if now.done == len(DATA):
            calls[0] += 1
            if calls[0] > 5:
                raise Cancelled("stopped")

    try:
        with pytest.raises(Cancelled, match="stopped"):
            download(wanted, tmp_path, client, stop_later)
    finally:
        ended.set()


def test_a_caller_can_stop_between_two_attempts(
    site: Site, client: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "WAIT_SECONDS", 60.0)
    monkeypatch.setattr(fetch, "SECONDS_BETWEEN_CALLS", 0.01)
    raw(b"", 503)(site)
    calls: list[DownloadProgress] = []

    def stop_later(now: DownloadProgress) -> None:
        calls.append(now)
        if len(calls) == 3:
            raise Cancelled("stopped")

    start = time.monotonic()
    with pytest.raises(Cancelled):
        download(bundle_of(site), tmp_path, client, stop_later)
    assert time.monotonic() - start < 20


def test_a_file_that_fails_stops_the_others_at_once(site: Site, client: httpx.Client, tmp_path: Path) -> None:
    site.files["/slow.safetensors"] = DATA
    site.seconds_a_chunk = 0.1
    files = [RemoteFile(f"{site.url}/{name}", name) for name in ("slow.safetensors", "absent.safetensors")]
    with pytest.raises(DownloadError, match="is not there"):
        download(Bundle("both", "some", tuple(files)), tmp_path, client, nothing)
    assert (tmp_path / "some/slow.safetensors.part").stat().st_size < len(DATA)


def test_a_disk_that_fills_up_is_said_also_if_the_size_is_unknown(
    site: Site, client: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw(DATA)(site)
    monkeypatch.setattr(fetch, "BYTES_BETWEEN_CHECKS", 100_000)
    free = iter([10**12, 10**12, 0])

    class Usage:
        @property
        def free(self) -> int:
            return next(free)

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage())
    with pytest.raises(StorageError, match=r"the disk has 0\.0 GB free"):
        download(bundle_of(site, None, None), tmp_path, client, nothing)


def test_a_folder_that_is_a_file_is_said(site: Site, client: httpx.Client, tmp_path: Path) -> None:
    (tmp_path / "some").write_text("a file")
    with pytest.raises(StorageError, match="cannot be written"):
        download(bundle_of(site), tmp_path, client, nothing)


def test_each_name_has_connections_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """TLS names belong to a connection: one to another name with the same address must not be used."""
    used: list[tuple[int, str]] = []

    def connect(self: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        used.append((id(self), request.extensions["sni_hostname"]))
        return httpx.Response(200)

    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("93.184.216.34", 443))])
    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", connect)
    with open_client() as opened:
        for host in ("one.example", "other.example", "one.example"):
            opened.get(f"https://{host}/x")
    assert used[0] == used[2]
    assert used[0][0] != used[1][0]


def test_a_name_that_is_none_is_an_error(site: Site) -> None:
    with open_client() as opened, pytest.raises(DownloadError, match="is no name of a host"):
        opened.get(f"https://{'x' * 70}.example/x")
