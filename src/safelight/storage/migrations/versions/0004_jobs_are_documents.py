"""A job's row holds the document that the worker gets and the picture records; before, it held the request alone."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("document", sa.JSON, nullable=False, server_default="{}"))
    op.execute("UPDATE jobs SET document = json_object('version', version, 'request', json(request))")
    op.drop_column("jobs", "request")
    op.drop_column("jobs", "version")
