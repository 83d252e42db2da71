"""Alembic's entry: it runs in the transaction that ``kbs.database.schema.upgrade`` holds."""

from __future__ import annotations

from alembic import context

from kbs.database.tables import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    transaction_per_migration=False,
    # SQLite changes a column by copying the table.
    render_as_batch=True,
)
context.run_migrations()
