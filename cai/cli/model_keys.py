"""Where the key of a sealed model comes from and goes to: files, release record, KBS.

A new key is on the disk before anything is sealed under it (``KEY.partial``), so that a run that
was killed can be gone on with, and it gets its name before the model appears. A key is removed
again only when no model is under it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai.cli.key_files import (
    drop_staged,
    key_in,
    name_staged,
    read_staged,
    refuse_existing,
    refuse_public_place,
    remove_empty,
    staged_path,
    sync_folder,
)
from cai.cli.release import Sealed, is_record_of, signed_record, uploader
from cai.errors import UsageError
from cai.terminal import Terminal

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from cai.secret import Secret


@dataclass
class ModelKeys:
    """The key of one sealing or rotation.

    Attributes:
        kek: the key itself.
        target: the sealed model.
        key_out: where a new key is written, if it is.
        record_out: where the release record is written, if it is.
        owner: signs records and manifests.
        journal: encrypts the journal of a sealing whose key is in no file; else ``None``.
        upload: gives the record to a KBS, if it shall.
        password: of a gocryptfs model, whose record holds no key; else ``None``.
    """

    kek: Secret
    target: Path
    key_out: Path | None = None
    record_out: Path | None = None
    owner: Ed25519PrivateKey | None = None
    journal: Secret | None = None
    upload: Callable[[bytes], None] | None = None
    password: Secret | None = None
    _new_owner: Path | None = None
    _resumed: bool = False
    _created: list[Path] = field(default_factory=list)

    @classmethod
    def chosen(
        cls, source: Path, target: Path, *, key_out: Path | None, key_file: Path | None,
        kbs: str | None, key_id: str | None, admin_key: Path | None, owner_key: Path | None,
        record_out: Path | None, rotating: bool = False, gocryptfs: bool = False,
        password_file: Path | None = None,
    ) -> ModelKeys:
        """Read and check everything that can be wrong before anything is sealed.

        Args:
            source: what is sealed.
            target: the sealed model.
            key_out: where a new key shall be written.
            key_file: the file with the key to use.
            kbs: address of a KBS's admin listener.
            key_id: the key's name there.
            admin_key: its admin key.
            owner_key: signs records and manifests; made when it is missing.
            record_out: where the release record shall be written.
            rotating: the options of a key are those of ``cai rotate``, and the target is there.
            gocryptfs: the key serves as a password, in hex.
            password_file: the file with the password of a gocryptfs model.

        Raises:
            UsageError: options that do not go together, or a key in a public place.
            InputError, FormatError, StorageError: a file cannot be read, or is there already.
        """
        if key_file and (key_out or kbs):
            raise UsageError("--key-file cannot stand beside --key-out or --kbs")
        if password_file and (key_file or key_out or not gocryptfs):
            raise UsageError(
                "--password-file is for --method gocryptfs, without --key-file or --key-out"
            )
        if not kbs and (key_id or admin_key):
            raise UsageError("--key-id and --admin-key need --kbs", hint="give the KBS's address")
        if kbs and not (key_id and admin_key and owner_key):
            raise UsageError("--kbs needs --key-id, --admin-key and --owner-key")
        if record_out and not owner_key:
            raise UsageError("--record-out needs --owner-key, which signs the record")
        if not (key_file or key_out or kbs or rotating or password_file):
            key_out = source.parent / f"{source.name}.key"
        for path in (key_out, record_out, owner_key):
            if path is not None:
                refuse_public_place(path, source, target)
        owner, new_owner = _owner(owner_key) if owner_key else (None, None)
        keys = _key(target, key_out, key_file, None if new_owner else owner)
        keys.record_out, keys.owner, keys._new_owner = record_out, owner, new_owner
        if gocryptfs:
            keys.password = _password(keys.kek, password_file)
        if record_out is not None and not keys._is_own_record(record_out):
            refuse_existing(record_out)
        if kbs and key_id and admin_key:
            keys.upload = uploader(kbs, key_id, admin_key, keys.password)
        return keys

    def stage(self) -> None:
        """Make a new key safe, before anything is sealed under it.

        Raises:
            StorageError: it cannot be written.
        """
        from cai.model import write_key_file

        if self.key_out is None:
            return
        staged = staged_path(self.key_out)
        if not staged.exists():
            write_key_file(staged, self.kek)
            sync_folder(staged.parent)
        self._created.append(staged)

    def place(self, sealed: Sealed, terminal: Terminal) -> None:
        """Put key and record in their places, before the sealed model appears."""
        from cai.cli.owner_keys import private_pem
        from cai.secret import Secret, write_secret_file

        if self._new_owner and self.owner:
            remove_empty(self._new_owner)
            write_secret_file(self._new_owner, private_pem(self.owner), what="owner key")
            self._created.append(self._new_owner)
            terminal.say(f"made the owner key {self._new_owner}: it signs releases, keep it safe")
        if self.key_out:
            if not (self._resumed and self.key_out.exists()):
                name_staged(staged_path(self.key_out), self.key_out, self.kek)
                sync_folder(self.key_out.parent)
            self._created.append(self.key_out)
        if not self.owner or not (self.record_out or self.upload):
            return
        record = signed_record(sealed, self.owner, None if self.password else self.kek)
        if self.record_out:
            if self._resumed and self._is_own_record(self.record_out):
                self.record_out.unlink()
            write_secret_file(self.record_out, Secret(record), what="release record")
            self._created.append(self.record_out)
        if self.upload:
            self.upload(record)

    def made(self, path: Path) -> None:
        """Note one more file that a failure shall remove again."""
        self._created.append(path)

    def finish(self) -> None:
        """Remove what only an interrupted run would have needed."""
        if self.key_out:
            staged_path(self.key_out).unlink(missing_ok=True)

    def undone_on_failure(self) -> _Undo:
        """Removes what was made when the work does not end well and no model is under the key."""
        return _Undo(self)

    def sign(self) -> Callable[[str], bytes] | None:
        """Gives ``manifest.sig`` for a model root, when there is an owner key."""
        from cai.model.signature import sign_root

        owner = self.owner
        return None if owner is None else lambda root: sign_root(root, owner)

    def tell(self, facts: dict[str, Any], lines: list[str]) -> None:
        """Add where keys and record are to a verb's result."""
        from cai.model.record import public_key_hex

        if self.owner:
            facts["owner_key"] = public_key_hex(self.owner)
            lines.append(f"owner key     {facts['owner_key']}")
        if self.key_out:
            facts["key_out"] = str(self.key_out)
            lines.append(f"key           {self.key_out} - never publish it, and keep a copy")
        if self.record_out:
            facts["record_out"] = str(self.record_out)
            note = "it holds the key as well" if self.password is None else "without the password"
            lines.append(f"record        {self.record_out} - {note}")
        if self.upload:
            what = "release record" if self.password is None else "password and release record"
            lines.append(f"the KBS has the {what}; nobody gets it before a policy allows it")

    def _is_own_record(self, path: Path) -> bool:
        """Whether an interrupted run wrote this record."""
        if not self._resumed or self.owner is None:
            return False
        return is_record_of(path, self.owner, None if self.password else self.kek)


class _Undo:
    """Removes files that were made, unless the block ends well or a model needs them."""

    def __init__(self, keys: ModelKeys) -> None:
        self._keys = keys

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        from cai.model.gocryptfs.rotating import opens_with
        from cai.model.rekeying import opens

        keys = self._keys
        if kind is None:
            return
        opened = opens if keys.password is None else opens_with
        if opened(keys.target, keys.password or keys.kek):
            drop_staged(keys.key_out)
            return
        for path in self._keys._created:
            path.unlink(missing_ok=True)


def _key(
    target: Path, key_out: Path | None, key_file: Path | None, owner: Ed25519PrivateKey | None
) -> ModelKeys:
    """The key that is given, the one of an interrupted run, or a new one."""
    from cai.model import new_key, read_key_file
    from cai.model.sealing import interrupted_kek, was_interrupted

    if key_file:
        kek = read_key_file(key_file)
        return ModelKeys(kek, target, _resumed=was_interrupted(target, kek))
    if key_out is None:
        # The key is in no file: the journal keeps it, under a secret of the owner's.
        secret = _journal_secret(owner) if owner else None
        found = interrupted_kek(target, secret) if secret else None
        return ModelKeys(found or new_key(), target, journal=secret, _resumed=found is not None)
    staged = read_staged(key_out)
    if staged is None or (key_out.exists() and key_in(key_out) != staged):
        refuse_existing(key_out)
    return ModelKeys(staged or new_key(), target, key_out, _resumed=staged is not None)


def _password(kek: Secret, password_file: Path | None) -> Secret:
    """The password of a gocryptfs model: what a file says, or the key as its key file spells it."""
    from cai.model.gocryptfs.keys import read_password_file
    from cai.secret import Secret

    if password_file is not None:
        return read_password_file(password_file)
    return Secret(kek.reveal().hex().encode("ascii"))


def _owner(path: Path) -> tuple[Ed25519PrivateKey, Path | None]:
    """The owner's key, and where a new one shall go."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from cai.cli.owner_keys import read_private_key

    if path.is_symlink() or (path.exists() and path.stat().st_size):
        return read_private_key(path, what="owner key"), None
    return Ed25519PrivateKey.generate(), path


def _journal_secret(owner: Ed25519PrivateKey) -> Secret:
    from cai.model.derive import expand, extract
    from cai.secret import Secret

    return Secret(expand(extract(b"", owner.private_bytes_raw()), b"cai/1 owner journal"))
