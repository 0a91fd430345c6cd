"""A job's row holds the document that the worker gets and the picture records; before, it held the request alone."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # SQLite commits each change of a table by itself. So every step is left out if an interrupted try has done it.
    columns = {column["name"] for column in sa.inspect(op.get_bind()).get_columns("jobs")}
    if "document" not in columns:
        op.add_column("jobs", sa.Column("document", sa.JSON, nullable=False, server_default="{}"))
    if {"request", "version"} <= columns:
        op.execute("UPDATE jobs SET document = json_object('version', version, 'request', json(request))")
        op.drop_column("jobs", "request")
        columns.remove("request")
    if "version" in columns:
        op.drop_column("jobs", "version")
