"""Keys of a cipher directory, and the passwords that lead to them (spec-gocryptfs §2, §5)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cai.errors import FormatError
from cai.model.files import SealedFiles
from cai.model.gocryptfs.config import CONTENT_LABEL, NAME_LABEL, Config, check_password, hkdf
from cai.model.gocryptfs.layout import CONF_FILE, MASTER_KEY_SIZE, MAX_CONF_FILE
from cai.model.layout import DATA_DIR
from cai.secret import Secret, read_secret_file

KEK_LABEL = b"cai/1 gocryptfs kek"
"""What the manifest's KEK is derived under; gocryptfs itself has no such label."""


@dataclass(frozen=True, slots=True)
class CipherKeys:
    """What is derived from a master key.

    Attributes:
        content: key of file contents and of targets, 32 bytes.
        name: key of names, 32 bytes.
        kek: wraps the DEK of the manifest.
        master: what they are derived from.
    """

    content: bytes = field(repr=False)
    name: bytes = field(repr=False)
    kek: Secret = field(repr=False)
    master: Secret = field(repr=False)

    @classmethod
    def of(cls, master_key: bytes) -> CipherKeys:
        """Derive them all.

        Raises:
            FormatError: a master key of another length.
        """
        if len(master_key) != MASTER_KEY_SIZE:
            raise FormatError(f"a master key has {MASTER_KEY_SIZE} bytes, not {len(master_key)}")
        return cls(
            hkdf(master_key, CONTENT_LABEL),
            hkdf(master_key, NAME_LABEL),
            Secret(hkdf(master_key, KEK_LABEL)),
            Secret(master_key),
        )


def unlock_directory(files: SealedFiles, password: Secret) -> CipherKeys:
    """Keys of the cipher directory of a sealed model.

    Raises:
        WrongKey: the password is another one, or the configuration was altered.
        Tampered: the configuration is missing.
        FormatError, LimitExceeded, InputError: it is not one that is read.
    """
    stored = f"{DATA_DIR}/{CONF_FILE}"
    return CipherKeys.of(Config.parse(files.read(stored, limit=MAX_CONF_FILE)).unlock(password))


def read_password_file(path: Path) -> Secret:
    """Read a password as stock's ``-passfile`` does: the first line, without its line break.

    A key file of ours, 64 hex digits and a line break, is such a file too.

    Raises:
        InputMissing, StorageError: it cannot be read.
        FormatError, LimitExceeded: the password is empty or too long.
    """
    text = read_secret_file(path, what="password file").reveal()
    password = Secret(text.partition(b"\n")[0])
    check_password(password)
    return password
