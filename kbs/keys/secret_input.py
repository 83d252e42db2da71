"""Secrets that open a key provider: a PIN, a passphrase, a token. By file or descriptor only.

A command line and an environment are read by others, so neither ever holds one. A file may be a
systemd credential (``/run/credentials/…``); a descriptor is read once, to its end.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cai.errors import FormatError, SettingError, StorageError, from_os_error
from cai.secret import MAX_SECRET_FILE, Secret, read_secret_file
from cai.settings import Section

MAX_DESCRIPTOR: Final = 1024
"""Largest descriptor number that a setting may name."""


@dataclass(slots=True)
class SecretInput:
    """Where one secret comes from.

    Attributes:
        what: names it in errors.
        file: the file that holds it.
        descriptor: the open descriptor that gives it instead.
    """

    what: str
    file: Path | None = None
    descriptor: int | None = None
    _read: Secret | None = field(default=None, repr=False)

    @classmethod
    def from_section(cls, section: Section, name: str, *, what: str) -> SecretInput:
        """Read the members ``<name>_file`` and ``<name>_fd``, of which there must be one.

        Raises:
            SettingError: there is none, or both.
        """
        file = section.text(f"{name}_file", "")
        descriptor = None
        if section.has(f"{name}_fd"):
            descriptor = section.integer(
                f"{name}_fd", least=0, most=MAX_DESCRIPTOR, unit="descriptors"
            )
        if bool(file) == (descriptor is not None):
            raise SettingError(
                f"{section.where}: give {name}_file or {name}_fd, one of them",
                hint="the secret itself never stands in a configuration",
            )
        return cls(what, Path(file) if file else None, descriptor)

    def read(self) -> Secret:
        """The secret without its final newline; a file is read anew each time.

        Raises:
            InputMissing, StorageError: it cannot be read, or others than its owner can.
            FormatError: it is empty or too long.
        """
        if self.file is not None:
            secret = _stripped(read_secret_file(self.file, what=self.what), self.what)
            if self.file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise StorageError(
                    f"{self.what} {self.file} is readable by others",
                    hint=f"chmod 0400 {self.file}",
                )
            return secret
        if self._read is None:
            self._read = _stripped(self._from_descriptor(), self.what)
        return self._read

    def _from_descriptor(self) -> Secret:
        if self.descriptor is None:
            raise SettingError(f"there is no place to read the {self.what} from")
        try:
            with os.fdopen(self.descriptor, "rb") as source:
                data = source.read(MAX_SECRET_FILE + 1)
        except OSError as error:
            doing = f"read the {self.what} from descriptor {self.descriptor}"
            raise from_os_error(error, doing) from error
        if len(data) > MAX_SECRET_FILE:
            raise FormatError(f"the {self.what} is longer than {MAX_SECRET_FILE} bytes")
        return Secret(data)


def _stripped(secret: Secret, what: str) -> Secret:
    text = secret.reveal().removesuffix(b"\n").removesuffix(b"\r")
    if not text:
        raise FormatError(f"the {what} is empty")
    return Secret(text)
