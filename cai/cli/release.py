"""The release record of a sealed model, and giving it to a KBS (decisions 3.1)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cai.errors import CaiError, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from cai.secret import Secret

_KEY_ID = re.compile(r"kbs:///([\w-][\w.-]*)/([\w-][\w.-]*)/([\w-][\w.-]*)", re.ASCII)


class Sealed(Protocol):
    """What a release record says of a model."""

    @property
    def model_id(self) -> str:
        """Of the model line, hex."""

    @property
    def revision(self) -> int:
        """From 1."""

    @property
    def root(self) -> str:
        """Model root, hex."""

    @property
    def index_sha256(self) -> str:
        """Hex."""

    @property
    def allow(self) -> tuple[str, ...]:
        """Flags."""


def signed_record(sealed: Sealed, owner: Ed25519PrivateKey, kek: Secret | None) -> bytes:
    """The record's bytes.

    Args:
        sealed: what it says.
        owner: signs it.
        kek: the key in it; ``None`` for a gocryptfs model, whose password is a resource of its own.
    """
    from cai.model import ReleaseRecord
    from cai.model.record import public_key_hex
    from cai.secret import Secret

    return ReleaseRecord(
        kek=kek or Secret(b""), model_id=sealed.model_id, manifest_root=sealed.root,
        min_revision=sealed.revision, index_sha256=sealed.index_sha256,
        owner_key=public_key_hex(owner), allow=sealed.allow,
    ).sign(owner)


def is_record_of(path: Path, owner: Ed25519PrivateKey, kek: Secret | None) -> bool:
    """Whether a file holds this owner's record with this key, or nothing at all."""
    from cai.model import ReleaseRecord
    from cai.model.record import public_key_hex
    from cai.secret import read_secret_file

    if path.is_symlink() or not path.exists():
        return False
    try:
        if not path.stat().st_size:
            return True  # killed between making it and writing it
        data = read_secret_file(path, what="release record").reveal()
        record = ReleaseRecord.parse(
            data, owner_key=public_key_hex(owner), with_kek=kek is not None
        )
    except CaiError:
        return False
    return kek is None or record.kek == kek


def uploader(
    kbs: str, key_id: str, admin_key: Path, password: Secret | None
) -> Callable[[bytes], None]:
    """What gives a record to a KBS.

    Args:
        kbs: address of its admin listener.
        key_id: ``kbs:///REPO/TYPE/TAG``.
        admin_key: file with its admin key.
        password: of a gocryptfs model, which goes there too.

    Raises:
        UsageError: a name or address will not do.
        InputError, FormatError, StorageError: the admin key cannot be read.
    """
    from cai.cli.kbs_upload import check_address, upload_resource
    from cai.cli.owner_keys import read_private_key

    match = _KEY_ID.fullmatch(key_id)
    if not match:
        raise UsageError(
            f"--key-id {key_id!r} is not a resource name", hint="kbs:///REPO/TYPE/TAG"
        )
    check_address(kbs)
    admin = read_private_key(admin_key, what="admin key")
    resource = "/".join(match.groups())

    def upload(record: bytes) -> None:
        if password is None:
            upload_resource(kbs, resource, record, admin)
            return
        # Stock hosts take the raw password (decisions 3.1); ours demand the record beside it.
        upload_resource(kbs, f"{resource}.cai", record, admin)
        upload_resource(kbs, resource, password.reveal(), admin)

    return upload
