"""A server that knows people: who gets in, and that nobody sees or changes what belongs to others."""

from __future__ import annotations

import base64
import io
import json
import os
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image as PILImage
from support import serving
from support.people import PASSWORD, PEOPLE, add_people, as_person, key_of
from support.serving import ASK, ended

from safelight.queue.people_table import ANY_SECONDS
from safelight.queue.person import ROLES, Person
from safelight.server import rights

SECRET = "a word that only max knows"

Json = dict[str, Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[serving.Server]:
    root = tmp_path_factory.mktemp("people")
    add_people(root, Person("gil", "guest"))
    limits = {"guest_max_pixels": 4096, "guest_max_steps": 4, "guest_max_waiting": 2, "guest_max_disk": 1e-4}
    (root / "safelight.yaml").write_text("".join(f"{name}: {value}\n" for name, value in limits.items()))
    with serving.serving(root) as made:
        with as_person(made, "ada") as http:
            until = time.monotonic() + 60
            while http.get("/api/v1/health").json()["worker"] != "ready":
                assert time.monotonic() < until
                time.sleep(0.05)
        yield made


def picture(colour: str) -> str:
    out = io.BytesIO()
    PILImage.new("RGB", (64, 64), colour).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def things_of(server: serving.Server, name: str) -> Json:
    """What a person has, as they see it."""
    with as_person(server, name) as http:
        return {
            path: http.get(f"/api/v1{path}").json()
            for path in ("/jobs", "/images?metadata=true", "/images?trashed=true", "/boards", "/presets", "/me/keys")
        }


@pytest.fixture(scope="module")
def owned(server: serving.Server) -> Json:
    """Everything that max has: an image, a job that waits, a board, a preset, an input image, a key."""
    with as_person(server, "max") as http, as_person(server, "ada") as admin:
        digest = http.post("/api/v1/inputs", json={"image": picture("purple")}).json()["digest"]
        asked = {**ASK, "prompt": SECRET, "width": 64, "height": 64, "image": digest, "strength": 0.9}
        job = http.post("/api/v1/generate", json=asked).json()["id"]
        assert ended(http, job)["state"] == "done"
        [image] = http.get(f"/api/v1/jobs/{job}/images").json()
        board = http.post("/api/v1/boards", json={"name": f"board: {SECRET}"}).json()["id"]
        http.patch("/api/v1/images", json={"ids": [image["id"]], "board": board, "add_tags": [SECRET]})
        http.put(f"/api/v1/presets/{SECRET}", json={"fields": {"prompt": SECRET}})
        assert admin.post("/api/v1/queue/pause").status_code == 204
        waits = http.post("/api/v1/generate", json={**ASK, "prompt": SECRET}).json()["id"]
        [key] = http.get("/api/v1/me/keys").json()
    return {
        "job_id": waits,
        "image_id": image["id"],
        "board_id": board,
        "digest": digest,
        "key_id": key["id"],
        "done": job,
    }


OF_PATHS = {"preset": SECRET, "model": "starter-noto", "adapter": "none", "slot": "cpu", "person": "max"}


def filled(path: str, owned: Json) -> str:
    """A path whose parameters name what max has."""
    names = {**owned, "name": SECRET, "download_id": "0" * 32, "version": "1"}
    for begin, kind in (("models", "model"), ("slots", "slot"), ("people", "person"), ("adapters", "adapter")):
        if path.startswith(f"/api/v1/{begin}/"):
            names["name"] = OF_PATHS[kind]
    if path.startswith("/v1/models"):
        names["name"] = "starter-noto"
    if path.startswith("/api/v1/settings"):
        names["name"] = "threads"
    return path.format_map(names)


def bodies(owned: Json) -> dict[str, Any]:
    """Bodies that try to reach what max has; all other routes get an empty object."""
    ids = {"ids": [owned["image_id"]]}
    return {
        "PATCH /api/v1/images": {**ids, "starred": True, "trashed": True, "add_tags": ["stolen"], "board": "none"},
        "POST /api/v1/images/details": ids,
        "POST /api/v1/images/delete": ids,
        "POST /api/v1/images/export": ids,
        "PUT /api/v1/queue/order": {"ids": [owned["job_id"]]},
        "PATCH /api/v1/jobs/{job_id}": {"priority": 3},
        "PATCH /api/v1/boards/{board_id}": {"name": "stolen", "shared": True},
        "POST /api/v1/generate": {**ASK, "width": 64, "height": 64, "image": owned["digest"]},
        "POST /api/v1/grid": {"request": {**ASK, "image": owned["digest"]}, "x": "seed=1,2"},
        "POST /api/v1/preprocess": {"image": owned["digest"], "preprocessor": "canny"},
        "PUT /api/v1/models/{name}/preview": {"image": owned["image_id"]},
        "PUT /api/v1/me/password": {"old": "wrong", "new": "something quite new"},
        "PUT /api/v1/presets/{name}": {"fields": {}},
        "POST /sdapi/v1/img2img": {"prompt": "x", "init_images": [owned["digest"]], "steps": 1},
        # The queue is paused, and this would wait.
        "POST /sdapi/v1/txt2img": {"no_such_field": 1},
        "POST /api/v1/login": {"name": "max", "password": "wrong"},
    }


PLAIN = ("/api/v1/events",)
"""Streams without end; another test listens to them."""


@pytest.fixture(scope="module")
def operations(server: serving.Server) -> list[tuple[str, str]]:
    with as_person(server, "ada") as http:
        described = http.get("/api/v1/openapi.json").json()
    return [(method.upper(), path) for path, each in described["paths"].items() for method in each]


def test_every_route_has_a_rule(operations: list[tuple[str, str]]) -> None:
    """A route that is not in the table is for administrators only. Each is there, so each was a decision."""
    known = {rights.re.sub(r"{\w+}", "{}", route) for route in rights.rules()}
    there = {rights.re.sub(r"{\w+}", "{}", f"{method} {path}") for method, path in operations}
    outside = {"GET /mcp", "POST /mcp", "DELETE /mcp", "GET /api/v1/openapi.json"}
    assert there - known == set()
    assert known - there == outside


@pytest.mark.parametrize("who", ["", "gus", "eve"])
def test_nobody_reaches_what_belongs_to_others(
    who: str, server: serving.Server, owned: Json, operations: list[tuple[str, str]]
) -> None:
    before, given = things_of(server, "max"), bodies(owned)
    secret = [SECRET, owned["image_id"], owned["job_id"], owned["done"], owned["board_id"], owned["key_id"]]
    role = PEOPLE.get(who)
    with as_person(server, who) as http:
        for method, path in operations:
            if path in PLAIN and who:
                continue
            needed = rights.rule_of(method, filled(path, owned)).role
            body = given.get(f"{method} {path}", {})
            more = {"json": body} if method in ("POST", "PUT", "PATCH") else {}
            answer = http.request(method, filled(path, owned), **more)
            said = f"{who} {method} {path}: {answer.status_code} {answer.text[:300]}"
            assert answer.status_code < 500 or path == "/api/v1/ready", said
            if needed is not None and role is None:
                assert answer.status_code == 401, said
            elif needed is not None and role is not None and ROLES.index(role) > ROLES.index(needed):
                assert answer.status_code == 403, said
            elif any(f"{{{name}}}" in path for name in ("job_id", "image_id", "board_id", "digest", "key_id")):
                assert answer.status_code == 404, said
            # It may say again what was asked for, but an answer says nothing else of it.
            if answer.is_success:
                assert not [word for word in secret if word in answer.text], said
    assert things_of(server, "max") == before


def test_a_request_may_not_name_the_input_image_of_another(server: serving.Server, owned: Json) -> None:
    with as_person(server, "eve") as http:
        asked = {**ASK, "width": 64, "height": 64, "image": owned["digest"]}
        answer = http.post("/api/v1/generate", json=asked)
        assert (answer.status_code, answer.json()["field"]) == (422, "image")
        assert "no input image of yours" in answer.json()["message"]
        # Who has the picture may send it, and gets the same digest.
        same = http.post("/api/v1/inputs", json={"image": picture("purple")}).json()["digest"]
        assert same == owned["digest"]
        assert http.get(f"/api/v1/inputs/{same}").status_code == 200


def test_the_limits_of_a_guest(server: serving.Server, owned: Json) -> None:
    del owned
    with as_person(server, "ada") as admin:
        # Tests run in any order, and others resume the queue.
        admin.post("/api/v1/queue/pause")
    with as_person(server, "gus") as http:
        for fields, field in (({"width": 128, "height": 64}, "width"), ({"steps": 5}, "steps")):
            answer = http.post("/api/v1/generate", json={**ASK, "width": 64, "height": 64, **fields})
            assert (answer.status_code, answer.json()["field"]) == (422, field), answer.text
        small = {**ASK, "width": 64, "height": 64}
        http.post("/api/v1/queue/cancel")
        assert [http.post("/api/v1/generate", json=small).status_code for _ in range(3)] == [202, 202, 429]
        me = http.get("/api/v1/me").json()
        assert (me["role"], me["max_pixels"], me["max_steps"], me["max_waiting"]) == ("guest", 4096, 4, 2)
        answer = http.post("/api/v1/queue/cancel", params={"everybody": True})
        assert answer.status_code == 403
        assert len(http.post("/api/v1/queue/cancel").json()["ids"]) == 2
        with ThreadPoolExecutor(8) as clients:
            codes = [*clients.map(lambda _: http.post("/api/v1/generate", json=small).status_code, range(12))]
        assert codes.count(202) == len(http.post("/api/v1/queue/cancel").json()["ids"]) == 2
    with as_person(server, "max") as http:
        assert http.get("/api/v1/queue").json()["waiting"], "only one's own jobs were cancelled"


def test_input_images_count_to_what_a_guest_has_on_disk(server: serving.Server) -> None:
    noise = PILImage.frombytes("RGB", (256, 256), os.urandom(3 << 16))
    out = io.BytesIO()
    noise.save(out, "PNG")
    body = {"image": base64.b64encode(out.getvalue()).decode()}
    with as_person(server, "gil") as http:
        assert http.get("/api/v1/me").json()["disk"] == 0
        # Also those of a request that is refused.
        wrong = {**ASK, "width": 64, "height": 64, "steps": 5, "image": f"data:image/png;base64,{picture('teal')}"}
        assert http.post("/api/v1/generate", json=wrong).json()["field"] == "steps"
        assert http.get("/api/v1/me").json()["disk"] > 0
        assert http.post("/api/v1/inputs", json=body).status_code == 201
        me = http.get("/api/v1/me").json()
        assert me["disk"] > me["max_disk"] == int(1e-4 * (1 << 30))
        for path, asked in (("inputs", body), ("generate", {**ASK, "width": 64, "height": 64})):
            answer = http.post(f"/api/v1/{path}", json=asked)
            assert (answer.status_code, answer.json()["error"]) == (403, "disk_limit"), answer.text
        answer = http.post("/v1/images/edits", data={"prompt": "x"}, files={"image": out.getvalue()})
        assert answer.status_code == 403


def test_a_shared_board_is_seen_and_not_changed(server: serving.Server, owned: Json) -> None:
    board, image = owned["board_id"], owned["image_id"]
    with as_person(server, "max") as http, as_person(server, "eve") as other:
        hers = other.get("/api/v1/images/count", params={"person": "eve"}).json()["count"]
        assert http.patch(f"/api/v1/boards/{board}", json={"shared": True}).json()["shared"]
        try:
            assert [one["id"] for one in other.get("/api/v1/boards").json()] == [board]
            assert other.get(f"/api/v1/images/{image}").json()["person"] == "max"
            assert [one["id"] for one in other.get(f"/api/v1/images?board={board}").json()["images"]] == [image]
            assert other.get(f"/api/v1/images/{image}/file").status_code == 200
            assert other.get(f"/api/v1/inputs/{owned['digest']}").status_code == 200
            assert other.get("/api/v1/images/count", params={"person": "eve"}).json()["count"] == hers
            assert other.patch("/api/v1/images", json={"ids": [image], "starred": True}).json() == {"ids": []}
            assert other.post("/api/v1/images/delete", json={"ids": [image]}).json() == {"ids": []}
            assert other.delete(f"/api/v1/images/{image}?permanently=true").status_code == 404
            assert other.delete(f"/api/v1/boards/{board}").status_code == 404
            answer = other.patch("/api/v1/images", json={"ids": [], "board": board})
            assert "there is no board" in answer.json()["message"]
        finally:
            http.patch(f"/api/v1/boards/{board}", json={"shared": False})
        assert other.get("/api/v1/boards").json() == []
        assert other.get(f"/api/v1/images/{image}").status_code == 404


def test_what_is_in_the_trash_of_a_shared_board_is_its_owners_again(server: serving.Server, owned: Json) -> None:
    board, image = owned["board_id"], owned["image_id"]
    with as_person(server, "max") as http, as_person(server, "eve") as other:
        http.patch(f"/api/v1/boards/{board}", json={"shared": True})
        http.patch("/api/v1/images", json={"ids": [image], "trashed": True})
        try:
            assert other.get(f"/api/v1/images/{image}").status_code == 404
            assert other.get("/api/v1/images?trashed=true").json()["images"] == []
            with as_person(server, "gus") as guest:
                assert guest.get(f"/api/v1/inputs/{owned['digest']}").status_code == 404
        finally:
            http.patch("/api/v1/images", json={"ids": [image], "trashed": False})
            http.patch(f"/api/v1/boards/{board}", json={"shared": False})


def test_no_path_gets_past_the_check(server: serving.Server, operations: list[tuple[str, str]]) -> None:
    """A pattern of a route also matches before a line end, and the check must not."""
    routes = [*operations, ("GET", "/mcp"), ("POST", "/mcp"), ("DELETE", "/mcp"), ("GET", "/api/v1/openapi.json")]
    with as_person(server, "") as http:
        for method, path in routes:
            if rights.rule_of(method, path).role is None:
                continue
            for ending in ("%0A", "/"):
                answer = http.request(method, f"{path}{ending}")
                assert answer.status_code in (400, 401), f"{method} {path}{ending}: {answer.status_code}"


def test_credentials_that_are_none_are_refused(server: serving.Server) -> None:
    for value in ("Basic é", "Basic ====", "Basic", "Bearer", "Digest x", "\xff"):
        answer = httpx.get(f"{server.url}/api/v1/jobs", headers=[(b"Authorization", value.encode("latin-1"))])
        assert answer.status_code == 401, value


def test_options_of_one_connection_are_those_of_each_person(server: serving.Server) -> None:
    """A proxy sends the requests of several people over the same connection."""
    with httpx.Client(base_url=server.url) as http:
        heard: list[int] = []
        for name, path in (("max", "post"), ("eve", "get"), ("max", "get")):
            headers = {"Authorization": f"Bearer {key_of(name)}"}
            if path == "post":
                http.post("/sdapi/v1/options", json={"CLIP_stop_at_last_layers": 5}, headers=headers)
            else:
                heard.append(http.get("/sdapi/v1/options", headers=headers).json()["CLIP_stop_at_last_layers"])
    assert heard == [1, 5]


def test_a_key_makes_no_keys_and_guests_get_no_processes_of_their_own(server: serving.Server) -> None:
    with as_person(server, "gus") as http:
        assert http.post("/api/v1/me/keys", json={"name": "more"}).status_code == 403
        answer = http.post("/api/v1/generate", json={**ASK, "width": 64, "height": 64, "isolate": True})
        assert (answer.status_code, answer.json()["field"]) == (422, "isolate")


def test_an_administrator_sees_all(server: serving.Server, owned: Json) -> None:
    with as_person(server, "ada") as http:
        assert http.get(f"/api/v1/images/{owned['image_id']}").json()["prompt"] == SECRET
        assert http.get("/api/v1/images/count", params={"person": "max"}).json()["count"] == 1
        assert http.get("/api/v1/images/count", params={"person": "ada"}).json()["count"] == 0
        assert {one["person"] for one in http.get("/api/v1/boards").json()} == {"max"}
        assert owned["job_id"] in [one["job"]["id"] for one in http.get("/api/v1/queue").json()["waiting"]]
        assert http.get("/api/v1/presets").json() == {}, "presets are one's own"


def test_others_jobs_are_counted_and_not_described(server: serving.Server, owned: Json) -> None:
    del owned
    with as_person(server, "eve") as http:
        seen = http.get("/api/v1/queue").json()
        assert (seen["waiting"], seen["running"], seen["others_waiting"]) == ([], [], 1)


def test_events_of_others_do_not_arrive(server: serving.Server, owned: Json) -> None:
    """Nor does A1111's progress, and A1111's interrupt stops nothing of others, also from the same address."""
    del owned
    heard: list[str] = []
    listens = threading.Event()

    def listen() -> None:
        with as_person(server, "eve") as http, http.stream("GET", "/api/v1/events") as stream:
            listens.set()
            for line in stream.iter_lines():
                heard.append(line)
                if "the end" in line:
                    return

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    assert listens.wait(30)
    with as_person(server, "max") as http, as_person(server, "eve") as other, as_person(server, "ada") as admin:
        admin.post("/api/v1/queue/resume")
        job = http.post("/api/v1/generate", json={**ASK, "prompt": SECRET, "steps": 60}).json()["id"]
        while (state := http.get(f"/api/v1/jobs/{job}").json())["state"] == "queued":
            time.sleep(0.02)
        assert other.get("/sdapi/v1/progress").json()["state"]["job"] == ""
        [slot] = other.get("/api/v1/slots").json()
        assert (slot["job"], slot["person"], slot["busy"]) == ("", "max", True)
        for path in ("interrupt", "skip"):
            assert other.post(f"/sdapi/v1/{path}").status_code == 200
        assert (state := ended(http, job))["state"] == "done", state
        own = other.post("/api/v1/generate", json={**ASK, "prompt": "the end"}).json()["id"]
        ended(other, own)
    thread.join(30)
    assert not thread.is_alive()
    text = "\n".join(heard)
    assert SECRET not in text
    assert own in text
    assert '"event": "progress"' not in [line for line in heard if job in line]
    assert not [line for line in heard if "preview" in line and job in line]


def test_log_in_log_out_and_passwords(server: serving.Server) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        assert http.get("/api/v1/me").json()["people"]
        assert http.get("/api/v1/me").json()["name"] == ""
        assert http.get("/").status_code == 200, "the page asks for name and password"
        assert http.get("/api/v1/images").status_code == 401
        wrong = [http.post("/api/v1/login", json={"name": name, "password": "x"}) for name in ("eve", "nobody at all")]
        assert wrong[0].json() == wrong[1].json()
        assert {one.status_code for one in wrong} == {401}
        assert "www-authenticate" not in wrong[0].headers
        answer = http.post("/api/v1/login", json={"name": "eve", "password": PASSWORD})
        assert (answer.status_code, answer.json()["name"], answer.json()["role"]) == (200, "eve", "member")
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert "Secure" not in cookie
        token = http.cookies["safelight_session"]
        assert http.get("/api/v1/images").status_code == 200
        assert serving.database_of(server.root) or token.encode() not in (server.root / "safelight.db").read_bytes()
        wrong_old = http.put("/api/v1/me/password", json={"old": "x", "new": "another long one"})
        assert (wrong_old.status_code, wrong_old.json()["field"]) == (422, "old")
        short = http.put("/api/v1/me/password", json={"old": PASSWORD, "new": "short"})
        assert "from 10 to 1000" in short.json()["message"]
        with httpx.Client(base_url=server.url, timeout=60) as second:
            second.post("/api/v1/login", json={"name": "eve", "password": PASSWORD})
            done = http.put("/api/v1/me/password", json={"old": PASSWORD, "new": "another long one"})
            assert done.status_code == 204
            assert second.get("/api/v1/images").status_code == 401, "other sessions end"
        assert http.get("/api/v1/images").status_code == 200
        http.put("/api/v1/me/password", json={"old": "another long one", "new": PASSWORD})
        key = http.post("/api/v1/me/keys", json={"name": "a script"}).json()
        for auth in (("anything", key["key"]), None):
            headers = {} if auth else {"Authorization": f"Bearer {key['key']}"}
            with httpx.Client(base_url=server.url, headers=headers, auth=auth) as script:
                assert script.get("/sdapi/v1/sd-models").status_code == 200
                assert script.get("/api/v1/me").json()["name"] == "eve"
        stored = b"" if serving.database_of(server.root) else (server.root / "safelight.db").read_bytes()
        assert key["key"].encode() not in stored
        assert http.delete(f"/api/v1/me/keys/{key['id']}").status_code == 204
        assert (
            httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key['key']}"}).status_code == 401
        )
        kept = dict(http.cookies)
        assert http.post("/api/v1/logout").status_code == 204
        with httpx.Client(base_url=server.url, cookies=kept) as again:
            assert again.get("/api/v1/images").status_code == 401, "the session is gone on the server, too"


def test_many_wrong_passwords_are_refused(server: serving.Server) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        wrong = {"name": "gus", "password": "wrong"}
        codes = [http.post("/api/v1/login", json=wrong).status_code for _ in range(12)]
        # Earlier tests have tried, too.
        assert codes == sorted(codes)
        assert 7 < codes.count(401) < 11
        assert http.post("/api/v1/login", json={"name": "gus", "password": PASSWORD}).status_code == 429
        # Nobody locks out others.
        assert http.post("/api/v1/login", json={"name": "max", "password": PASSWORD}).status_code == 200


def test_people_are_administered_and_everything_is_in_the_audit_log(server: serving.Server) -> None:
    with as_person(server, "ada") as http:
        new = {"name": "Zoë 2", "password": "a long password", "role": "guest", "weight": 2.5}
        assert http.post("/api/v1/people", json=new).json()["role"] == "guest"
        assert "already a person" in http.post("/api/v1/people", json={**new, "name": "ZOË 2"}).json()["message"]
        assert http.patch("/api/v1/people/Zoë 2", json={"role": "member"}).json()["role"] == "member"
        assert "only administrator" in http.patch("/api/v1/people/ada", json={"role": "guest"}).json()["message"]
        assert http.delete("/api/v1/people/ada").status_code == 422
        assert http.delete("/api/v1/people/Zoë 2").status_code == 204
        assert http.delete("/api/v1/people/Zoë 2").status_code == 404
        assert [one["name"] for one in http.get("/api/v1/people").json()] == sorted([*PEOPLE, "gil"])
        http.post("/api/v1/slots/auto/drain")
        http.post("/api/v1/slots/auto/resume")
        entries = http.get("/api/v1/audit").json()
        said = [(one["person"], one["action"], one["detail"] or one["subject"]) for one in entries]
        assert said[0] == ("ada", "POST /api/v1/slots/auto/resume", "")
        assert ("ada", "POST /api/v1/people", "Zoë 2, guest") in said
        assert ("ada", "PATCH /api/v1/people/Zoë 2", "role: member") in said
        assert ("ada", "DELETE /api/v1/people/Zoë 2", "") in said
        text = json.dumps(entries)
        assert "a long password" not in text
        newer = http.get("/api/v1/audit", params={"limit": 1, "before": entries[0]["number"]}).json()
        assert newer == [entries[1]]


def test_other_clients_are_people_too(server: serving.Server, owned: Json) -> None:
    """OpenAI's and A1111's API make images of the person whose key they send."""
    del owned
    with as_person(server, "ada") as admin:
        admin.post("/api/v1/queue/resume")
    with as_person(server, "eve") as http:
        before = http.get("/api/v1/images/count", params={"person": "eve"}).json()["count"]
        asked = {"prompt": "red apple", "model": "starter-noto", "size": "64x64", "response_format": "url"}
        [datum] = http.post("/v1/images/generations", json={**asked, "steps": 2}).json()["data"]
        assert http.get(datum["url"]).status_code == 200
        assert httpx.get(datum["url"]).status_code == 401
        with as_person(server, "max") as other:
            assert other.get(datum["url"]).status_code == 404
        a1111 = {"prompt": "red apple", "steps": 2, "width": 64, "height": 64}
        assert http.post("/sdapi/v1/txt2img", json=a1111).status_code == 200
        assert http.get("/api/v1/images/count", params={"person": "eve"}).json()["count"] == before + 2


def test_the_first_person_comes_from_the_machine_and_gets_what_was_there(tmp_path: Path) -> None:
    """The running server notices within a second; who was using it must log in."""
    with serving.serving(tmp_path) as server, server.client() as http:
        job = serving.make(http)["id"]
        assert ended(http, job)["state"] == "done"
        http.post("/api/v1/boards", json={"name": "old"})
        refused = http.post("/api/v1/people", json={"name": "mallory", "password": PASSWORD, "role": "admin"})
        assert refused.status_code == 403
        add_people(tmp_path)
        time.sleep(ANY_SECONDS)
        assert http.get("/api/v1/images").status_code == 401
        with as_person(server, "ada") as ada:
            assert [one["person"] for one in ada.get("/api/v1/images").json()["images"]] == ["ada"]
            assert [one["person"] for one in ada.get("/api/v1/boards").json()] == ["ada"]
            # Names of hosts need no check any more, because everybody must log in.
            assert ada.get("/api/v1/jobs", headers={"Host": "images.example.org"}).status_code == 200
        foreign = {"Origin": "https://evil.example", "Authorization": f"Bearer {key_of('ada')}"}
        assert httpx.get(f"{server.url}/api/v1/jobs", headers=foreign).status_code == 403


def test_a_digest_in_a_prompt_gives_no_right_to_its_picture(server: serving.Server, owned: Json) -> None:
    with as_person(server, "ada") as admin, as_person(server, "eve") as http:
        admin.post("/api/v1/queue/resume")
        digest = http.post("/api/v1/inputs", json={"image": picture("teal")}).json()["digest"]
        with as_person(server, "gus") as other:
            job = other.post("/api/v1/generate", json={**ASK, "prompt": digest, "width": 64, "height": 64}).json()["id"]
            assert ended(other, job)["state"] == "done"
            assert other.get(f"/api/v1/inputs/{digest}").status_code == 404
        admin.post("/api/v1/queue/pause")
    del owned


def test_a_stream_ends_when_its_person_is_removed(server: serving.Server) -> None:
    """And what their running job still makes goes to the heir, not to a later person of the same name."""
    with as_person(server, "ada") as http:
        new = {"name": "tom", "password": PASSWORD, "role": "admin"}
        http.post("/api/v1/people", json=new)
        http.post("/api/v1/queue/resume")
        with httpx.Client(base_url=server.url, timeout=60) as tom:
            tom.post("/api/v1/login", json={"name": "tom", "password": PASSWORD})
            cookies = dict(tom.cookies)
            job = tom.post("/api/v1/generate", json={**ASK, "steps": 60, "count": 2}).json()["id"]
            while http.get(f"/api/v1/jobs/{job}").json()["state"] == "queued":
                time.sleep(0.02)
            with httpx.stream("GET", f"{server.url}/api/v1/events", cookies=cookies, timeout=60) as stream:
                lines = stream.iter_lines()
                next(lines)
                assert http.delete("/api/v1/people/tom", params={"heir": "gus"}).status_code == 204
                time.sleep(5.5)
                serving.make(http, prompt=SECRET)
                assert SECRET not in "\n".join(lines), "the stream ends"
        assert ended(http, job)["state"] == "done"
        http.post("/api/v1/people", json={**new, "role": "member"})
        images = http.get("/api/v1/images", params={"person": "gus"}).json()["images"]
        assert [one["job"] for one in images].count(job) == 2
        assert http.get("/api/v1/images/count", params={"person": "tom"}).json()["count"] == 0
        http.delete("/api/v1/people/tom")
