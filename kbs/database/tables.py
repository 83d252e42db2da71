"""The tables of the key broker.

They hold sealed rows wherever contents matter for a release; what stands beside them in clear
(path, version, expiry) is in each row's authenticated identity or contents. Every change happens in
one transaction together with its audit row.

Numbers that count or tell a time are ``BigInteger``: PostgreSQL's ``integer`` ends in 2038. A table
whose rows live for minutes says ``info=SHORT_LIVED`` and stays out of backups: a restored challenge
could be answered twice. Each table stands again in ``migrations/versions``; a test compares.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, MetaData, Table, Text

METADATA: Final = MetaData()

SHORT_LIVED: Final = {"short-lived": True}
"""``info`` of a table that no backup holds."""

INSTANCE: Final = Table(
    "instance",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("realm", Text, nullable=False),
    Column("created", Text, nullable=False),
)
"""One row: who this database is."""

SECRET: Final = Table(
    "secret",
    METADATA,
    Column("path", Text, primary_key=True),
    Column("version", Integer, nullable=False),
    Column("sealed", LargeBinary, nullable=False),
)
"""The broker's own keys: ``token-key``, ``admin-key`` (the public half)."""

# Keys and resources.

ROW_KEY: Final = Table(
    "row_key",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("generation", BigInteger, nullable=False),
    Column("provider", Text, nullable=False),
    Column("wrapped", LargeBinary, nullable=False),
    Column("commitment", LargeBinary, nullable=False),
)
"""One row: the key of the sealed rows, wrapped by the key provider in force; ``generation`` counts
the rotations."""

SIGNING_KEY: Final = Table(
    "signing_key",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("created", BigInteger, nullable=False),
    Column("sealed", LargeBinary, nullable=False),
)
"""The broker's own signing keys, all versions; ``created`` in Unix seconds."""

RESOURCE: Final = Table(
    "resource",
    METADATA,
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
"""Every version of each resource; ``wrapped`` is its data key, wrapped by ``provider``."""

POLICY: Final = Table(
    "policy",
    METADATA,
    Column("path", Text, primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("sealed", LargeBinary, nullable=False),
)
"""Every version of each policy, by ``kbs.policy.names``."""

REFERENCE: Final = Table(
    "reference",
    METADATA,
    Column("path", Text, primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("sealed", LargeBinary, nullable=False),
)
"""Every version of reference values and of the keys that sign them."""

SESSION: Final = Table(
    "session",
    METADATA,
    Column("ref", Text, primary_key=True),
    Column("nonce", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("tee", Text, nullable=False),
    Column("selector", Text, nullable=False, default=""),
    Column("state", Text, nullable=False),
    Column("expires", BigInteger, nullable=False, index=True),
    Column("sealed", LargeBinary, nullable=True),
    info=SHORT_LIVED,
)
"""Protocol sessions; ``ref`` is the SHA-256 of the cookie, ``expires`` in Unix seconds."""

CHALLENGE: Final = Table(
    "challenge",
    METADATA,
    Column("ref", Text, primary_key=True),
    Column("state", Text, nullable=False),
    Column("expires", BigInteger, nullable=False, index=True),
    info=SHORT_LIVED,
)
"""Challenges of the attestation service; ``ref`` is the SHA-256 of the nonce."""

ADMIN: Final = Table(
    "admin",
    METADATA,
    Column("path", Text, primary_key=True),
    Column("version", BigInteger, nullable=False),
    Column("key_id", Text, nullable=False, index=True),
    Column("sealed", LargeBinary, nullable=False),
)
"""Administrators by name."""

PROPOSAL: Final = Table(
    "proposal",
    METADATA,
    Column("path", Text, primary_key=True),
    Column("version", BigInteger, nullable=False),
    Column("sealed", LargeBinary, nullable=False),
)
"""Changes that wait for further persons, by their random id."""

AUDIT_HEAD: Final = Table(
    "audit_head",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("size", BigInteger, nullable=False),
    Column("changes", BigInteger, nullable=False, default=0),
    Column("frontier", LargeBinary, nullable=False, default=b""),
    Column("origin", Text, nullable=False, default=""),
    Column("checkpoint", BigInteger, nullable=False, default=0),
    Column("failures", BigInteger, nullable=False, default=-1),
)
"""One row that every decision locks: how many leaves there are, how many administrative changes,
the hashes of the maximal complete subtrees, the origin of checkpoints where a restore made another,
the size of the newest checkpoint, and the place of the newest leaf that counts failures."""

AUDIT: Final = Table(
    "audit",
    METADATA,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("object", Text, nullable=False),
    Column("version", BigInteger, nullable=False, default=0),
    Column("leaf", LargeBinary, nullable=False),
    # The newest leaf about an object, or about one of its versions, is found by an index alone.
    Index("ix_audit_object_seq", "object", "seq"),
    Index("ix_audit_object_version", "object", "version", "seq"),
)
"""The audit log; ``leaf`` is the canonical bytes, ``object`` and ``version`` what they changed."""

AUDIT_NODE: Final = Table(
    "audit_node",
    METADATA,
    Column("level", Integer, primary_key=True, autoincrement=False),
    Column("position", BigInteger, primary_key=True, autoincrement=False),
    Column("hash", LargeBinary, nullable=False),
)
"""Hashes of the complete subtrees above the leaves, so that proofs read O(log n) rows."""

AUDIT_CHECKPOINT: Final = Table(
    "audit_checkpoint",
    METADATA,
    Column("origin", Text, primary_key=True),
    Column("size", BigInteger, primary_key=True, autoincrement=False),
    Column("note", LargeBinary, nullable=False),
)
"""Every checkpoint that was signed, before it is published; one for each size of a log."""

# Release.

BLOCK: Final = Table(
    "block",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("version", Integer, nullable=False),
    Column("sealed", LargeBinary, nullable=False),
)
"""What was revoked; ``id`` is derived from kind and value, so a decision asks for it by name."""

LEASE: Final = Table(
    "lease",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("version", Integer, nullable=False),
    Column("ends", BigInteger, nullable=False, index=True),
    Column("sealed", LargeBinary, nullable=False),
)
"""Leases; ``version`` counts the renewals, ``ends`` is when the last request of the newest one
ends, Unix seconds."""
