"""Alibaba Cloud's key service as both ways in see it: calls, secrets, refusals."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any, Final, Protocol

from cai.errors import FormatError

TIMEOUT_SECONDS: Final = 10
"""How long one call may take, seconds."""


@dataclass(frozen=True, slots=True)
class KmsSecret:
    """One version of a secret that KMS keeps."""

    contents: bytes
    version: str

    def __repr__(self) -> str:
        return f"<secret of {len(self.contents)} bytes, version {self.version!r}>"


class KmsRefusal(Exception):
    """KMS answers with an error code."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class Kms(Protocol):
    """What both ways in can do."""

    def encrypt(self, key: str, plaintext: bytes) -> bytes:
        """Encrypt a few bytes under a key of KMS.

        Raises:
            KmsRefusal: it says no.
            Unavailable: it does not answer.
        """
        ...

    def decrypt(self, key: str, sealed: bytes) -> bytes:
        """The bytes again.

        Raises:
            KmsRefusal: it says no.
            Unavailable: it does not answer.
        """
        ...

    def secret(self, name: str) -> KmsSecret:
        """The current version of a secret.

        Raises:
            KmsRefusal: it says no.
            Unavailable: it does not answer.
        """
        ...

    def close(self) -> None:
        """Give back what is held open."""
        ...


def secret_of(data: Any, kind: Any, version: Any) -> KmsSecret:
    """A secret from the members of an answer; binary secrets are base64.

    Raises:
        FormatError: a member is missing or of another form.
    """
    text = kms_text(data)
    contents = kms_bytes(text) if kind == "binary" else text.encode("utf-8", "replace")
    return KmsSecret(contents, str(version or ""))


def kms_text(value: Any) -> str:
    """A text member of an answer.

    Raises:
        FormatError: it is missing or no text.
    """
    if not isinstance(value, str):
        raise FormatError("Alibaba Cloud KMS: the answer lacks a member")
    return value


def kms_bytes(text: str) -> bytes:
    """A base64 member of an answer.

    Raises:
        FormatError: it is not base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError("Alibaba Cloud KMS: the answer is not base64") from error
