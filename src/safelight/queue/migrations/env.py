"""Run the migrations. Alembic executes this file; :mod:`safelight.queue.database_file` passes the connection."""

from __future__ import annotations

from alembic import context

from safelight.queue.tables import Table

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Table.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
