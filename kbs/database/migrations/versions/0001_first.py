"""The first schema.

It mirrors ``kbs.database.tables``, table by table and in the same order; a test compares the two.
"""

from __future__ import annotations

from alembic import op
from sqlalchemy import BigInteger, Column, Integer, LargeBinary, Text

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "instance",
        Column("id", Text, primary_key=True),
        Column("realm", Text, nullable=False),
        Column("created", Text, nullable=False),
    )
    op.create_table(
        "secret",
        Column("path", Text, primary_key=True),
        Column("version", Integer, nullable=False),
        Column("sealed", LargeBinary, nullable=False),
    )
    op.create_table(
        "row_key",
        Column("id", Integer, primary_key=True, autoincrement=False),
        Column("generation", BigInteger, nullable=False),
        Column("provider", Text, nullable=False),
        Column("wrapped", LargeBinary, nullable=False),
        Column("commitment", LargeBinary, nullable=False),
    )
    op.create_table(
        "signing_key",
        Column("name", Text, primary_key=True),
        Column("version", BigInteger, primary_key=True, autoincrement=False),
        Column("created", BigInteger, nullable=False),
        Column("sealed", LargeBinary, nullable=False),
    )
    op.create_table(
        "resource",
        Column("path", Text, primary_key=True),
        Column("version", BigInteger, primary_key=True, autoincrement=False),
        Column("owner", Text, nullable=False),
        Column("model", Text, nullable=False),
        Column("lease", Text, nullable=False),
        Column("size", Integer, nullable=False),
        Column("created", BigInteger, nullable=False),
        Column("provider", Text, nullable=False),
        Column("wrapped", LargeBinary, nullable=False),
        Column("sealed", LargeBinary, nullable=False),
    )
    op.create_table(
        "policy",
        Column("path", Text, primary_key=True),
        Column("version", Integer, primary_key=True, autoincrement=False),
        Column("sealed", LargeBinary, nullable=False),
    )
    op.create_table(
        "reference",
        Column("path", Text, primary_key=True),
        Column("version", Integer, primary_key=True, autoincrement=False),
        Column("sealed", LargeBinary, nullable=False),
    )
    op.create_table(
        "session",
        Column("ref", Text, primary_key=True),
        Column("nonce", Text, nullable=False),
        Column("version", Text, nullable=False),
        Column("tee", Text, nullable=False),
        Column("selector", Text, nullable=False),
        Column("state", Text, nullable=False),
        Column("expires", BigInteger, nullable=False),
        Column("sealed", LargeBinary, nullable=True),
    )
    op.create_index("ix_session_expires", "session", ["expires"])
    op.create_table(
        "challenge",
        Column("ref", Text, primary_key=True),
        Column("state", Text, nullable=False),
        Column("expires", BigInteger, nullable=False),
    )
    op.create_index("ix_challenge_expires", "challenge", ["expires"])
    op.create_table(
        "admin",
        Column("path", Text, primary_key=True),
        Column("version", BigInteger, nullable=False),
        Column("key_id", Text, nullable=False),
        Column("sealed", LargeBinary, nullable=False),
    )
    op.create_index("ix_admin_key_id", "admin", ["key_id"])
    op.create_table(
        "proposal",
        Column("path", Text, primary_key=True),
        Column("version", BigInteger, nullable=False),
        Column("sealed", LargeBinary, nullable=False),
    )
    op.create_table(
        "audit_head",
        Column("id", Integer, primary_key=True, autoincrement=False),
        Column("size", BigInteger, nullable=False),
        Column("changes", BigInteger, nullable=False),
        Column("frontier", LargeBinary, nullable=False),
        Column("origin", Text, nullable=False),
        Column("checkpoint", BigInteger, nullable=False),
        Column("failures", BigInteger, nullable=False),
    )
    op.create_table(
        "audit",
        Column("seq", BigInteger, primary_key=True, autoincrement=False),
        Column("object", Text, nullable=False),
        Column("version", BigInteger, nullable=False),
        Column("leaf", LargeBinary, nullable=False),
    )
    op.create_index("ix_audit_object_seq", "audit", ["object", "seq"])
    op.create_index("ix_audit_object_version", "audit", ["object", "version", "seq"])
    op.create_table(
        "audit_node",
        Column("level", Integer, primary_key=True, autoincrement=False),
        Column("position", BigInteger, primary_key=True, autoincrement=False),
        Column("hash", LargeBinary, nullable=False),
    )
    op.create_table(
        "audit_checkpoint",
        Column("origin", Text, primary_key=True),
        Column("size", BigInteger, primary_key=True, autoincrement=False),
        Column("note", LargeBinary, nullable=False),
    )
    op.create_table(
        "block",
        Column("id", Text, primary_key=True),
        Column("version", Integer, nullable=False),
        Column("sealed", LargeBinary, nullable=False),
    )
    op.create_table(
        "lease",
        Column("id", Text, primary_key=True),
        Column("version", Integer, nullable=False),
        Column("ends", BigInteger, nullable=False),
        Column("sealed", LargeBinary, nullable=False),
    )
    op.create_index("ix_lease_ends", "lease", ["ends"])
