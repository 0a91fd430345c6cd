"""The server can know people: with passwords, keys and sessions. Images, boards and presets belong to somebody."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # SQLite commits each change of a table by itself. So a step is left out if an interrupted try has done it.
    bind = op.get_bind()
    there = {one["name"] for one in sa.inspect(bind).get_columns("images")}
    if "person" not in there:
        op.add_column("images", sa.Column("person", sa.String, nullable=False, server_default=""))
    if "bytes" not in there:
        op.add_column("images", sa.Column("bytes", sa.Integer, nullable=False, server_default="0"))
    op.execute("CREATE INDEX IF NOT EXISTS images_by_person ON images (person, trashed, created, number)")
    _own_boards()
    _own_presets()
    for table in ("people", "person_keys", "person_sessions", "audit", "input_owners"):
        op.execute(f"DROP TABLE IF EXISTS {table}")
    op.create_table(
        "people",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("role", sa.String, nullable=False),
        sa.Column("password", sa.String, nullable=False),
        sa.Column("weight", sa.Float, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
    )
    op.create_table(
        "person_keys",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("person", sa.String, sa.ForeignKey("people.name"), nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("digest", sa.String, nullable=False, unique=True),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("used", sa.Float),
    )
    op.create_table(
        "person_sessions",
        sa.Column("digest", sa.String, primary_key=True),
        sa.Column("person", sa.String, sa.ForeignKey("people.name"), nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("expires", sa.Float, nullable=False),
    )
    op.create_table(
        "audit",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("person", sa.String, nullable=False),
        sa.Column("action", sa.String, nullable=False),
        sa.Column("subject", sa.String, nullable=False),
        sa.Column("detail", sa.String, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "input_owners",
        sa.Column("digest", sa.String, primary_key=True),
        sa.Column("person", sa.String, primary_key=True),
    )


def _own_boards() -> None:
    """Give boards an owner. Names of boards are unique for each owner, so the table is made again."""
    bind = op.get_bind()
    tables = set(sa.inspect(bind).get_table_names())
    if "boards" in tables and "person" not in {one["name"] for one in sa.inspect(bind).get_columns("boards")}:
        op.execute("DROP TABLE IF EXISTS boards_new")
        op.create_table(
            "boards_new",
            sa.Column("id", sa.String, primary_key=True),
            sa.Column("name", sa.String, nullable=False),
            sa.Column("created", sa.Float, nullable=False),
            sa.Column("person", sa.String, nullable=False),
            sa.Column("shared", sa.Boolean, nullable=False),
            sa.UniqueConstraint("person", "name"),
        )
        op.execute(
            "INSERT INTO boards_new (id, name, created, person, shared) SELECT id, name, created, '', false FROM boards"
        )
        op.execute("DROP TABLE boards")
        tables.remove("boards")
    if "boards" not in tables:
        op.rename_table("boards_new", "boards")


def _own_presets() -> None:
    """Give presets an owner, in the same way."""
    bind = op.get_bind()
    tables = set(sa.inspect(bind).get_table_names())
    if "presets" in tables and "person" not in {one["name"] for one in sa.inspect(bind).get_columns("presets")}:
        op.execute("DROP TABLE IF EXISTS presets_new")
        op.create_table(
            "presets_new",
            sa.Column("person", sa.String, primary_key=True),
            sa.Column("name", sa.String, primary_key=True),
            sa.Column("fields", sa.JSON, nullable=False),
        )
        op.execute("INSERT INTO presets_new (person, name, fields) SELECT '', name, fields FROM presets")
        op.execute("DROP TABLE presets")
        tables.remove("presets")
    if "presets" not in tables:
        op.rename_table("presets_new", "presets")
