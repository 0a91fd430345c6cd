"""The kind of a job's failure, which decides the HTTP status of the answer."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("failure", sa.String, nullable=False, server_default=""))
