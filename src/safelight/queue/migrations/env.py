"""Run the migrations. Alembic executes this file; :mod:`safelight.queue.sql_database` passes the connection."""

from __future__ import annotations

from alembic import context

from safelight.queue.tables import Table

connection = context.config.attributes["connection"]
# SQLite changes few things of a table; for the others, the table is made again.
sqlite = connection.dialect.name == "sqlite"
context.configure(connection=connection, target_metadata=Table.metadata, render_as_batch=sqlite)
with context.begin_transaction():
    context.run_migrations()
