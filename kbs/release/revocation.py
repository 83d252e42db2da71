"""Blocks: what is released to nobody any more, whatever the policies say (decisions §5).

A block names a model, a version of it, a platform, a launch digest or an owner. Every release and
every grant of a lease asks for the blocks of all that it is about, in the transaction that commits
the decision. The id of a block is derived from what it names, and the audit log's newest leaf about
it counts: a block whose row was deleted behind the broker's back still blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Connection, Row, delete, insert, select

from cai import jcs
from cai.attest.facts import Facts
from cai.attest.ticket import platform_id
from cai.errors import FormatError, InputMissing, Tampered
from kbs.audit.log import Change, newest_change
from kbs.database.tables import BLOCK
from kbs.keys.sealing import RowIdentity, Sealer, row_hash
from kbs.names import ResourceName
from kbs.release.model import ModelFacts

if TYPE_CHECKING:
    from kbs.core import Core

MAX_REASON = 512
"""Longest reason of a block, characters."""

MAX_BLOCK = 16 * 1024
"""Largest stored block that is read back, bytes."""

LAUNCH_EVENT: Final = "cai launch "
"""What the RTMR3 event says in front of the launch digest (decisions §1.2)."""


class BlockKind(StrEnum):
    """What a block names; the value is its name in commands and audit leaves."""

    MODEL = "model"
    VERSION = "version"
    PLATFORM = "platform"
    LAUNCH = "launch"
    OWNER = "owner"


_NUMBER: Final = re.compile(r"[1-9][0-9]{0,14}", re.ASCII)

_FORMS: Final = {
    BlockKind.MODEL: (r"[0-9a-f]{64}", "a model id (64 hex digits) or a resource"),
    BlockKind.VERSION: (r"[0-9a-f]{64}", "a model root (64 hex digits) or <resource>@<version>"),
    BlockKind.PLATFORM: (
        r"[0-9a-f]{32}|[0-9a-f]{64}|[0-9]{1,80}",
        "a platform id (64 hex digits), a PPID or platform instance id (32), or a GPU's UEID",
    ),
    BlockKind.LAUNCH: (r"[0-9a-f]{96}", "a launch digest (96 hex digits)"),
    BlockKind.OWNER: (r"[0-9a-f]{64}", "an owner's key (64 hex digits)"),
}


@dataclass(frozen=True, slots=True, order=True)
class Target:
    """What a block names.

    Attributes:
        kind: of the name.
        value: the name.
    """

    kind: BlockKind
    value: str

    @classmethod
    def parse(cls, kind: str, value: str) -> Target:
        """Read what a person names.

        Raises:
            FormatError: no such kind, or the value is not of its form.
        """
        try:
            known = BlockKind(kind)
        except ValueError as error:
            raise FormatError(
                f"{kind[:32]!r} cannot be revoked", hint=f"known are: {', '.join(BlockKind)}"
            ) from error
        form, words = _FORMS[known]
        if re.fullmatch(form, value, re.ASCII):
            return cls(known, value)
        if known is BlockKind.MODEL and "/" in value:
            return cls(known, ResourceName.parse(value).path)
        path, at, number = value.rpartition("@")
        if known is BlockKind.VERSION and at and _NUMBER.fullmatch(number):
            return cls(known, f"{ResourceName.parse(path).path}@{number}")
        raise FormatError(f"revoke {known}: {value[:128]!r} is not {words}")

    @property
    def id(self) -> str:
        """Id of the block of this, 32 hex digits."""
        named = jcs.canonical({"kind": self.kind.value, "value": self.value})
        return sha256(b"cai/kbs block\x00" + named).hexdigest()[:32]

    @property
    def object(self) -> str:
        """What the audit log calls that block."""
        return f"{BLOCK.name}/{self.id}"

    def __str__(self) -> str:
        return f"{self.kind}/{self.value}"


@dataclass(frozen=True, slots=True)
class Block:
    """One block.

    Attributes:
        target: what it names.
        reason: in words.
        created: Unix seconds.
    """

    target: Target
    reason: str
    created: int

    def to_json(self) -> dict[str, Any]:
        """As the admin listener shows it."""
        return {
            "kind": self.target.kind.value,
            "value": self.target.value,
            "reason": self.reason,
            "created": self.created,
        }


def targets(
    facts: Facts, resource: ResourceName, *, version: int, model: ModelFacts
) -> tuple[Target, ...]:
    """Everything that a release of ``resource`` to this guest is about.

    Args:
        facts: of the guest.
        resource: what it asks for.
        version: of the resource.
        model: what the resource says about its model.
    """
    named: list[tuple[BlockKind, str]] = [
        (BlockKind.MODEL, model.model_id),
        (BlockKind.MODEL, resource.path),
        (BlockKind.VERSION, model.root),
        (BlockKind.VERSION, f"{resource.path}@{version}"),
        (BlockKind.OWNER, model.owner_key),
        (BlockKind.PLATFORM, platform_id(facts.tdx)),
        (BlockKind.PLATFORM, facts.tdx.ppid),
        (BlockKind.PLATFORM, facts.tdx.platform_instance_id),
        *((BlockKind.PLATFORM, device.ueid) for device in facts.devices),
        *((BlockKind.LAUNCH, digest) for digest in launch_digests(facts)),
    ]
    return tuple(sorted({Target(kind, value) for kind, value in named if value}))


def launch_digests(facts: Facts) -> tuple[str, ...]:
    """Launch digests that the evidence names: by the statement, by the measured events."""
    events = facts.runtime_events or ()
    measured = [
        event.removeprefix(LAUNCH_EVENT) for event in events if event.startswith(LAUNCH_EVENT)
    ]
    return tuple(dict.fromkeys(digest for digest in (facts.launch_digest, *measured) if digest))


class BlockStore:
    """The blocks of one database."""

    def __init__(self, *, instance: str, realm: str, sealer: Sealer) -> None:
        self._instance = instance
        self._realm = realm
        self._sealer = sealer

    @classmethod
    def of(cls, core: Core) -> BlockStore:
        """The store of this broker."""
        instance = core.instance
        return cls(instance=instance.id, realm=instance.realm.value, sealer=instance.sealer)

    def hits(self, connection: Connection, named: Iterable[Target]) -> tuple[Block, ...]:
        """The blocks of any of these.

        Raises:
            Tampered: a block's row is not the one in the audit log.
        """
        wanted = {target.id: target for target in named}
        rows = {
            row.id: row
            for row in connection.execute(select(BLOCK).where(BLOCK.c.id.in_(list(wanted))))
        }
        found = [
            self._open(connection, target, rows.get(block_id))
            for block_id, target in wanted.items()
        ]
        return tuple(block for block in found if block is not None)

    def put(self, connection: Connection, block: Block) -> Change:
        """Store a block, or its new reason, in the caller's transaction, which logs the change."""
        target = block.target
        version = self._next_version(connection, target)
        sealed = self._sealer.seal(self._identity(target, version), jcs.canonical(block.to_json()))
        connection.execute(delete(BLOCK).where(BLOCK.c.id == target.id))
        connection.execute(insert(BLOCK).values(id=target.id, version=version, sealed=sealed))
        return Change(target.object, version, row_hash(sealed))

    def lift(self, connection: Connection, target: Target) -> Change:
        """Take a block away in the caller's transaction, which logs the change.

        Raises:
            InputMissing: there is none.
        """
        logged = newest_change(connection, target.object)
        if logged is None or not logged.row_hash:
            raise InputMissing(f"{target} is not revoked", hint="kbs revoke --list")
        connection.execute(delete(BLOCK).where(BLOCK.c.id == target.id))
        return Change(target.object, logged.version + 1, "")

    def all(self, connection: Connection) -> list[Block]:
        """Every block, oldest first.

        Raises:
            Tampered: a row is not the one in the audit log.
        """
        blocks: list[Block] = []
        for row in connection.execute(select(BLOCK)):
            identity = RowIdentity(self._instance, self._realm, BLOCK.name, row.id, row.version)
            block = _parse(self._sealer.open(identity, row.sealed))
            opened = self._open(connection, block.target, row)
            if opened is not None:
                blocks.append(opened)
        return sorted(blocks, key=lambda block: (block.created, block.target))

    def _open(
        self, connection: Connection, target: Target, row: Row[Any] | None
    ) -> Block | None:
        logged = newest_change(connection, target.object)
        if row is None:
            if logged is not None and logged.row_hash:
                raise Tampered(
                    f"the block of {target} is gone, the audit log has it",
                    hint="the database was edited; revoke it again",
                )
            return None
        if logged != Change(target.object, row.version, row_hash(row.sealed)):
            raise Tampered(f"the block of {target} is not the one in the audit log")
        block = _parse(self._sealer.open(self._identity(target, row.version), row.sealed))
        if block.target != target:
            raise Tampered(f"the block of {target} names something else")
        return block

    def _next_version(self, connection: Connection, target: Target) -> int:
        logged = newest_change(connection, target.object)
        return 1 if logged is None else logged.version + 1

    def _identity(self, target: Target, version: int) -> RowIdentity:
        return RowIdentity(self._instance, self._realm, BLOCK.name, target.id, version)


def new_block(target: Target, reason: str, now: datetime) -> Block:
    """A block that begins now.

    Raises:
        FormatError: the reason is empty, too long or not printable.
    """
    if not 0 < len(reason) <= MAX_REASON or not reason.isprintable():
        raise FormatError(f"a reason has 1 to {MAX_REASON} printable characters")
    return Block(target, reason, int(now.timestamp()))


def _parse(record: bytes) -> Block:
    value = jcs.parse_canonical(record, what="block", limit=MAX_BLOCK)
    try:
        target = Target(BlockKind(value["kind"]), value["value"])
        return Block(target, value["reason"], value["created"])
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError("block: a member is missing or of another form") from error
