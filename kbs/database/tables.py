"""The tables of the key broker.

They hold sealed rows wherever contents matter for a release; what stands beside them in clear
(path, version, expiry) is in each row's authenticated identity or contents. Every change happens in
one transaction together with its audit row.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Column, Integer, LargeBinary, MetaData, Table, Text

SCHEMA: Final = 1
"""Version of the tables below."""

METADATA: Final = MetaData()

INSTANCE: Final = Table(
    "instance",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("realm", Text, nullable=False),
    Column("schema", Integer, nullable=False),
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

RESOURCE: Final = Table(
    "resource",
    METADATA,
    Column("path", Text, primary_key=True),
    Column("version", Integer, nullable=False),
    Column("owner", Text, nullable=False),
    Column("sealed", LargeBinary, nullable=False),
)
"""Newest version of each resource."""

POLICY: Final = Table(
    "policy",
    METADATA,
    Column("path", Text, primary_key=True),
    Column("version", Integer, nullable=False),
    Column("owner", Text, nullable=False),
    Column("sealed", LargeBinary, nullable=False),
)
"""Newest version of each policy: ``release`` (Rego) and ``verification`` (policy.toml)."""

SESSION: Final = Table(
    "session",
    METADATA,
    Column("ref", Text, primary_key=True),
    Column("nonce", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("tee", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("expires", Integer, nullable=False, index=True),
    Column("sealed", LargeBinary, nullable=True),
)
"""Protocol sessions; ``ref`` is the SHA-256 of the cookie, ``expires`` in Unix seconds."""

AUDIT_HEAD: Final = Table(
    "audit_head",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("size", Integer, nullable=False),
)
"""One row that every decision locks: how many audit rows there are."""

AUDIT: Final = Table(
    "audit",
    METADATA,
    Column("seq", Integer, primary_key=True),
    Column("object", Text, nullable=False, index=True),
    Column("leaf", LargeBinary, nullable=False),
)
"""The audit log; ``leaf`` is the canonical bytes, ``object`` what they changed, if anything."""
