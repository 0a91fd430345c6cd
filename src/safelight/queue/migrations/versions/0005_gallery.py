"""Images have boards, stars, tags, a trash and a full-text index, and need no job. Requests can be saved as presets."""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

from safelight.queue.search_text import searchable

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # SQLite commits each change of a table by itself. So every step is left out if an interrupted try has done it.
    bind = op.get_bind()
    tables = set(sa.inspect(bind).get_table_names())
    for table in ("image_loras", "image_tags", "image_texts", "boards"):
        op.execute(f"DROP TABLE IF EXISTS {table}")
    op.create_table(
        "boards",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("name", sa.String, nullable=False, unique=True),
        sa.Column("created", sa.Float, nullable=False),
    )
    if "presets" not in tables:
        op.create_table(
            "presets",
            sa.Column("name", sa.String, primary_key=True),
            sa.Column("fields", sa.JSON, nullable=False),
        )
    if "images" in tables and "number" not in {one["name"] for one in sa.inspect(bind).get_columns("images")}:
        op.execute("DROP TABLE IF EXISTS images_new")
        _create_images()
        op.execute(
            "INSERT INTO images_new (id, job, place, file, width, height, seed, model, model_digest, pixels_sha256, "
            "created, program, prompt, negative, imported, starred, board, trashed, metadata) "
            "SELECT id, job, place, file, width, height, seed, model, model_digest, pixels_sha256, created, "
            "'Safelight', coalesce(json_extract(metadata, '$.request.prompt'), ''), "
            "coalesce(json_extract(metadata, '$.request.negative'), ''), 0, 0, NULL, NULL, metadata "
            "FROM images ORDER BY created, id"
        )
        op.execute("DROP TABLE images")
        tables.remove("images")
    if "images" not in tables:
        op.rename_table("images_new", "images")
    for name, columns in (
        ("images_by_time", "trashed, created, number"),
        ("images_by_model", "model, trashed, created, number"),
        ("images_by_board", "board, trashed, created, number"),
        ("images_by_seed", "seed, trashed, created, number"),
        ("images_by_program", "program, trashed, created, number"),
        ("images_by_star", "starred, trashed, created, number"),
        ("images_by_file", "file"),
    ):
        op.execute(f"CREATE INDEX IF NOT EXISTS {name} ON images ({columns})")
    for table, column in (("image_loras", "lora"), ("image_tags", "tag")):
        op.create_table(
            table,
            sa.Column(column, sa.String, primary_key=True),
            sa.Column("image", sa.Integer, sa.ForeignKey("images.number"), primary_key=True),
        )
        op.create_index(f"{table}_by_image", table, ["image"])
    op.execute(
        "CREATE VIRTUAL TABLE image_texts USING "
        "fts5(prompt, names, tags, file, tokenize = 'unicode61 remove_diacritics 2', prefix = '2 3')"
    )
    _fill()


def _create_images() -> None:
    op.create_table(
        "images_new",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String, nullable=False, unique=True),
        sa.Column("job", sa.String, sa.ForeignKey("jobs.id")),
        sa.Column("place", sa.Integer, nullable=False),
        sa.Column("file", sa.String, nullable=False),
        sa.Column("width", sa.Integer, nullable=False),
        sa.Column("height", sa.Integer, nullable=False),
        sa.Column("seed", sa.Integer),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("model_digest", sa.String, nullable=False),
        sa.Column("pixels_sha256", sa.String, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("program", sa.String, nullable=False),
        sa.Column("prompt", sa.String, nullable=False),
        sa.Column("negative", sa.String, nullable=False),
        sa.Column("imported", sa.Boolean, nullable=False),
        sa.Column("starred", sa.Boolean, nullable=False),
        sa.Column("board", sa.String, sa.ForeignKey("boards.id")),
        sa.Column("trashed", sa.Float),
        sa.Column("same", sa.Boolean),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.UniqueConstraint("job", "place"),
        sqlite_autoincrement=True,
    )


def _fill() -> None:
    """Write the texts and LoRAs of the images that there are."""
    bind = op.get_bind()
    rows = bind.execute(
        sa.text("SELECT number, prompt, model, json_extract(metadata, '$.request.loras') AS loras FROM images")
    ).all()
    for number, prompt, model, stored in rows:
        loras = list(dict.fromkeys(str(one["name"]) for one in json.loads(stored or "[]") if "name" in one))
        for lora in loras:
            bind.execute(
                sa.text("INSERT INTO image_loras (lora, image) VALUES (:lora, :image)"), {"lora": lora, "image": number}
            )
        bind.execute(
            sa.text(
                "INSERT INTO image_texts (rowid, prompt, names, tags, file) VALUES (:number, :prompt, :names, '', '')"
            ),
            {"number": number, "prompt": searchable(prompt), "names": searchable(" ".join([model, *loras]))},
        )
