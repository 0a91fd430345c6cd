"""Images over HTTP: lists, boards, changes of many, the trash, archives, and imported pictures."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import httpx
import pytest
from PIL import Image as PILImage
from support.foreign_pictures import PICTURES, PROMPT
from support.serving import Server, database_of, ended, make

from safelight.queue.database import Database
from safelight.queue.image_import import import_pictures


@pytest.fixture
def images(http: httpx.Client) -> list[dict[str, Any]]:
    """Two images of one job."""
    job = ended(http, make(http, count=2)["id"])
    return http.get(f"/api/v1/jobs/{job['id']}/images").json()


def listed(http: httpx.Client, **wanted: object) -> list[str]:
    answer = http.get("/api/v1/images", params=wanted)
    assert answer.status_code == 200, answer.text
    return [image["id"] for image in answer.json()["images"]]


def test_a_list_goes_on_where_it_ended(http: httpx.Client, images: list[dict[str, Any]]) -> None:
    first = http.get("/api/v1/images", params={"limit": 1}).json()
    assert (first["images"][0]["id"], first["images"][0]["metadata"]) == (images[1]["id"], None)
    second = http.get("/api/v1/images", params={"limit": 1, "cursor": first["next"], "metadata": True}).json()
    assert second["images"] == [images[0]]
    count = http.get("/api/v1/images/count").json()["count"]
    assert count == len(http.get("/api/v1/images/ids").json()["ids"]) >= 2
    assert listed(http, search=images[0]["prompt"].split()[0], seed=images[0]["seed"])[0] == images[0]["id"]
    assert images[0]["model"] in http.get("/api/v1/images/facets").json()["models"]
    for wrong in ({"cursor": "x"}, {"limit": 0}, {"boards": "x"}, {"board": "x"}, {"seed": -1}):
        assert http.get("/api/v1/images", params=wrong).status_code == 422, wrong


def test_many_are_changed_at_once_and_everybody_hears_of_it(http: httpx.Client, images: list[dict[str, Any]]) -> None:
    ids = [image["id"] for image in images]
    board = http.post("/api/v1/boards", json={"name": " 狐狸 "}).json()
    assert board["name"] == "狐狸"
    assert http.post("/api/v1/boards", json={"name": "狐狸"}).status_code == 422
    with http.stream("GET", "/api/v1/events") as stream:
        change = {"ids": ids, "starred": True, "board": board["id"], "add_tags": ["good"]}
        assert http.patch("/api/v1/images", json=change).json()["ids"] == ids
        lines = stream.iter_lines()
        assert next(line for line in lines if line == "event: images")
        assert json.loads(next(lines).removeprefix("data: "))["ids"] == ids
    assert listed(http, board=board["id"], starred=True, tag="good") == ids[::-1]
    # Other tests use this server, too.
    assert board | {"images": 2, "cover": ids[1]} in http.get("/api/v1/boards").json()
    assert http.patch(f"/api/v1/boards/{board['id']}", json={"name": "foxes"}).json()["name"] == "foxes"
    assert http.patch("/api/v1/images", json={"ids": ids, "board": "f" * 32}).status_code == 422
    assert http.patch("/api/v1/images", json={"ids": ids, "tags": ["x"]}).status_code == 422
    assert http.delete(f"/api/v1/boards/{board['id']}").status_code == 204
    assert http.delete(f"/api/v1/boards/{board['id']}").status_code == 404
    assert http.get(f"/api/v1/images/{ids[0]}").json()["board"] == ""


def test_what_is_removed_can_be_restored_until_it_is_deleted(
    http: httpx.Client, images: list[dict[str, Any]], server: Server
) -> None:
    one = images[0]["id"]
    assert http.delete(f"/api/v1/images/{one}").status_code == 204
    assert one not in listed(http)
    assert one in listed(http, trashed=True)
    assert http.get(f"/api/v1/images/{one}/file").status_code == 200
    assert http.patch("/api/v1/images", json={"ids": [one], "trashed": False}).json()["ids"] == [one]
    assert one in listed(http)
    before = set(server.root.glob("images/*/*.png"))
    assert http.delete(f"/api/v1/images/{one}", params={"permanently": True}).status_code == 204
    for path in ("", "/file", "/thumbnail"):
        assert http.get(f"/api/v1/images/{one}{path}").status_code == 404
    assert len(before - set(server.root.glob("images/*/*.png"))) == 1
    assert http.delete(f"/api/v1/images/{one}").status_code == 404
    other = images[1]["id"]
    assert http.post("/api/v1/images/delete", json={"ids": [other, one]}).json()["ids"] == [other]


def test_an_archive_has_the_files(http: httpx.Client, images: list[dict[str, Any]]) -> None:
    answer = http.post("/api/v1/images/export", json={"ids": [image["id"] for image in images] + ["0" * 32]})
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        found = json.loads(archive.read("images.json"))
        assert [one["pixels_sha256"] for one in found] == [image["pixels_sha256"] for image in images]
        assert archive.read(found[0]["file"]) == http.get(images[0]["url"]).content


def test_a_picture_of_another_program_is_an_image_like_all(http: httpx.Client, server: Server) -> None:
    folder = server.root / "their pictures"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(PICTURES["A1111, JPEG"]())
    database = Database(server.root, url=database_of(server.root), migrate=False)
    list(import_pictures(folder, database.images))
    database.close()
    (image,) = http.get("/api/v1/images", params={"program": "A1111", "metadata": True}).json()["images"]
    assert image["prompt"].startswith(PROMPT)
    assert http.get(image["url"]).content == (folder / "a.jpg").read_bytes()
    with PILImage.open(io.BytesIO(http.get(image["thumbnail"]).content)) as small:
        assert small.format == "WEBP"
    made = http.get(f"/api/v1/images/{image['id']}/generation-data").json()
    assert made["use"]["request"]["prompt"].startswith(PROMPT)
    assert "made by A1111" in http.get(image["url"], params={"format": "png"}).json()["message"]
    assert http.post(f"/api/v1/images/{image['id']}/check").status_code == 422
    (folder / "a.jpg").unlink()
    assert http.get(image["url"]).status_code == 404
    assert http.get(f"/api/v1/images/{image['id']}/generation-data").status_code == 404
    assert http.delete(f"/api/v1/images/{image['id']}", params={"permanently": True}).status_code == 204


def test_a_model_has_the_preview_that_a_user_chose(http: httpx.Client, images: list[dict[str, Any]]) -> None:
    path = "/api/v1/models/starter-noto"
    assert http.get(path).json()["preview"] == ""
    assert http.get(f"{path}/preview").status_code == 404
    assert http.put(f"{path}/preview", json={"image": images[0]["id"]}).status_code == 204
    assert http.get(path).json()["preview"] == f"{path}/preview"
    answer = http.get(f"{path}/preview")
    assert http.get(f"{path}/preview", headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    with PILImage.open(io.BytesIO(answer.content)) as picture:
        assert picture.size == (images[0]["width"], images[0]["height"])
    assert http.put(f"{path}/preview", json={"image": "0" * 32}).status_code == 404
    assert http.put(f"{path}/preview", json={"image": ""}).status_code == 204
    assert http.get(path).json()["preview"] == ""
    assert http.get("/api/v1/adapters/nobody/preview").status_code == 404
