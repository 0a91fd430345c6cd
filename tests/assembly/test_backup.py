"""A backup has what a root has, is verified, and is restored completely or not at all."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from support import postgres, serving
from typer.testing import CliRunner

from safelight.assembly import backup
from safelight.cli.main import app
from safelight.errors import CorruptFileError, InputError
from safelight.queue.database import Database
from safelight.settings import Settings

RUN = CliRunner()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A root with jobs and images, and its backup, written while the server runs."""
    root = tmp_path_factory.mktemp("root")
    (root / "safelight.yaml").write_text("max_steps: 99\n")
    (root / "wildcards").mkdir()
    (root / "wildcards/animal.txt").write_text("cat\ndog\n")
    (root / "unread.json").write_text("{}")
    (root / "previews").mkdir()
    (root / "previews/chosen.webp").write_bytes(b"a picture")
    saved = tmp_path_factory.mktemp("saved") / "all.zip"
    with serving.serving(root) as server, server.client() as http:
        for seed in range(3):
            serving.ended(http, serving.make(http, seed=seed)["id"])
        http.post("/api/v1/boards", json={"name": "kept"})
        made = RUN.invoke(app, ["--root", str(root), "backup", str(saved), "--pictures", "--json"])
        assert made.exit_code == 0, made.output
        assert json.loads(made.stdout)["pictures"]
    return root, saved


def test_what_is_restored_is_what_was_there(full: tuple[Path, Path], tmp_path: Path) -> None:
    root, saved = full
    there = tmp_path / "there"
    done = RUN.invoke(app, ["restore", str(saved), "--root", str(there), "--json"])
    assert done.exit_code == 0, done.output
    assert (there / "safelight.yaml").read_text() == "max_steps: 99\n"
    assert (there / "wildcards/animal.txt").read_bytes() == (root / "wildcards/animal.txt").read_bytes()
    # They may have a secret.
    assert [(path.stat().st_mode & 0o777) for path in (saved, there / "safelight.yaml")] == [0o600, 0o600]
    assert (there / "unread.json").read_text() == "{}"
    assert (there / "previews/chosen.webp").read_bytes() == b"a picture"
    pictures = sorted(one.relative_to(root) for one in (root / "images").rglob("*.png"))
    assert len(pictures) == 3
    for one in pictures:
        assert (there / one).read_bytes() == (root / one).read_bytes()
    with serving.serving(there) as server, server.client() as http:
        assert len(http.get("/api/v1/jobs").json()) == 3
        assert [board["name"] for board in http.get("/api/v1/boards").json()] == ["kept"]
        [image, *_] = http.get("/api/v1/images").json()["images"]
        assert http.get(image["url"]).status_code == 200
        assert http.post(f"/api/v1/images/{image['id']}/check").json()["same"]


def test_what_is_made_while_a_backup_is_written_has_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, copy = tmp_path / "root", backup._copy_database
    (root / "images").mkdir(parents=True)
    (root / "images/first.png").write_bytes(b"first")
    half = root / "images/.safelight-half"
    half.write_bytes(b"half")
    Database(root).close()

    def copy_late(settings: Settings, target: Path) -> bool:
        (root / "images/late.png").write_bytes(b"late")
        half.unlink()
        return copy(settings, target)

    monkeypatch.setattr(backup, "_copy_database", copy_late)
    backup.write(Settings(root=root), tmp_path / "all.zip", pictures=True)
    backup.restore(tmp_path / "all.zip", Settings(root=tmp_path / "there"))
    assert sorted(one.name for one in (tmp_path / "there/images").iterdir()) == ["first.png", "late.png"]


def test_without_pictures_it_is_small(full: tuple[Path, Path], tmp_path: Path) -> None:
    root, _ = full
    made = backup.write(Settings(root=root), tmp_path / "small.zip", pictures=False)
    with zipfile.ZipFile(made.path) as archive:
        assert not [name for name in archive.namelist() if name.startswith("images")]
    assert backup.restore(made.path, Settings(root=tmp_path / "there")).files == made.files
    database = Database(tmp_path / "there")
    assert len(database.jobs()) == 3
    database.close()


def test_nothing_is_overwritten(full: tuple[Path, Path], tmp_path: Path) -> None:
    root, saved = full
    with pytest.raises(InputError, match="already exists"):
        backup.write(Settings(root=root), saved, pictures=False)
    with pytest.raises(InputError, match="has data already"):
        backup.restore(saved, Settings(root=root))
    with pytest.raises(InputError, match="nothing to back up"):
        backup.write(Settings(root=tmp_path / "empty"), tmp_path / "x.zip", pictures=True)
    assert not (tmp_path / "x.zip").exists()


def damaged(saved: Path, out: Path, change: str) -> Path:
    """A copy of a backup with a fault."""
    with zipfile.ZipFile(saved) as archive, zipfile.ZipFile(out, "w") as copy:
        about = json.loads(archive.read(backup.MANIFEST))
        for name in archive.namelist():
            data = archive.read(name)
            if name == "safelight.yaml":
                if change == "gone":
                    continue
                data = b"max_steps: 98\n" if change == "other bytes" else data
            if name == backup.MANIFEST:
                if change == "outside":
                    about["files"]["../evil"] = about["files"].pop("safelight.yaml")
                data = json.dumps(about).encode()
            copy.writestr(name, data)
    return out


@pytest.mark.parametrize("change", ["other bytes", "gone", "outside"])
def test_a_damaged_backup_restores_nothing(change: str, full: tuple[Path, Path], tmp_path: Path) -> None:
    there = tmp_path / "there"
    with pytest.raises(CorruptFileError):
        backup.restore(damaged(full[1], tmp_path / "bad.zip", change), Settings(root=there))
    assert list(there.iterdir()) == []
    assert not (tmp_path / "evil").exists()


def test_a_part_of_a_backup_is_none(full: tuple[Path, Path], tmp_path: Path) -> None:
    part = tmp_path / "part.zip"
    part.write_bytes(full[1].read_bytes()[: full[1].stat().st_size // 2])
    for wrong in (part, tmp_path / "nothing.zip"):
        with pytest.raises(InputError):
            backup.restore(wrong, Settings(root=tmp_path / "there"))


@postgres.needs_postgres
def test_a_backup_moves_from_sqlite_to_postgresql_and_back(full: tuple[Path, Path], tmp_path: Path) -> None:
    """So it is also the way from one database to the other."""
    _, saved = full
    there = Settings(root=tmp_path / "there", database_url=postgres.cluster().new())
    backup.restore(saved, there)
    assert not (there.root / "safelight.db").exists()
    database = Database(there.root, url=there.plain_database_url)
    try:
        assert len(database.jobs()) == 3
        assert [board.name for board in database.boards.all()] == ["kept"]
        assert len(database.images.page().images) == 3
    finally:
        database.close()
    with pytest.raises(InputError, match="has data already"):
        backup.restore(saved, Settings(root=tmp_path / "again", database_url=there.database_url))
    assert not list((tmp_path / "again").glob("*")), "nothing is half restored"
    again = backup.write(there, tmp_path / "again.zip", pictures=True)
    back = Settings(root=tmp_path / "back")
    backup.restore(again.path, back)
    database = Database(back.root)
    try:
        assert len(database.jobs()) == 3
    finally:
        database.close()
