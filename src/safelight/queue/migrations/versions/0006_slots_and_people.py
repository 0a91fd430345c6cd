"""A job has the person who sent it, and the slot that ran it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # SQLite commits each change of a table by itself. So a step is left out if an interrupted try has done it.
    there = {one["name"] for one in sa.inspect(op.get_bind()).get_columns("jobs")}
    for name in ("person", "slot"):
        if name not in there:
            op.add_column("jobs", sa.Column(name, sa.String, nullable=False, server_default=""))
    op.execute("CREATE INDEX IF NOT EXISTS jobs_by_person ON jobs (state, person, number)")
    op.execute("CREATE INDEX IF NOT EXISTS jobs_by_priority ON jobs (state, person, priority DESC, number)")
