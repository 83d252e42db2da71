"""Alibaba Cloud KMS: encryption by a key that stays there, and secrets that are kept there.

Two ways in. Over the service's public API (an AccessKey) by ``alibabacloud_kms20160120``. Or over
the address of a KMS instance (client key, password, CA certificate) by ``alibabacloud-dkms-gcs``;
that official package pins versions of pyOpenSSL and protobuf that are too old to live beside ours,
so it runs in a child process under an interpreter of its own (``aliyun_instance.py``).

Untested against the service itself; see docs/kbs-keys.md.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any, Final, Protocol

from cai.errors import CaiError, FormatError, SettingError, Tampered, Unavailable
from cai.secret import Secret
from cai.settings import Section
from kbs.keys.optional import load
from kbs.keys.provider import bind, unbind
from kbs.keys.secret_input import SecretInput

TIMEOUT_SECONDS: Final = 10
"""How long one call may take, seconds."""

_MISSING: Final = ("Forbidden.ResourceNotFound", "Forbidden.SecretNotFound", "NotFound")
_BAD_DATA: Final = ("InvalidParameter", "CiphertextBlob", "InvalidCiphertext", "DecryptFailed",
                    "UnsupportedOperation")  # fmt: skip


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


class OpenApiKms:
    """KMS over its public API.

    Args:
        endpoint: e.g. ``kms.cn-hangzhou.aliyuncs.com``, or an instance's; without a scheme.
        access_key_id: of a RAM user that may do only this.
        access_key_secret: its secret.
        plain_http: for a simulator on a loopback address.

    Raises:
        SettingError: the SDK is not installed.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        access_key_id: SecretInput,
        access_key_secret: SecretInput,
        plain_http: bool = False,
    ) -> None:
        runtime = load("darabonba.runtime", extra="aliyun")
        self._models = load("alibabacloud_kms20160120.models", extra="aliyun")
        self._endpoint = endpoint
        self._inputs = (access_key_id, access_key_secret)
        self._protocol = "http" if plain_http else "https"
        self._opened: Any = None
        self._runtime = runtime.RuntimeOptions(
            autoretry=False,
            connect_timeout=1000 * TIMEOUT_SECONDS,
            read_timeout=1000 * TIMEOUT_SECONDS,
        )

    def encrypt(self, key: str, plaintext: bytes) -> bytes:
        """See ``Kms``."""
        request = self._models.EncryptRequest(
            key_id=key, plaintext=base64.b64encode(plaintext).decode("ascii")
        )
        body = self._call(lambda: self._client().encrypt_with_options(request, self._runtime))
        return _text(body.ciphertext_blob).encode("utf-8")

    def decrypt(self, key: str, sealed: bytes) -> bytes:
        """See ``Kms``; the ciphertext names its key."""
        del key
        request = self._models.DecryptRequest(ciphertext_blob=sealed.decode("utf-8", "replace"))
        body = self._call(lambda: self._client().decrypt_with_options(request, self._runtime))
        return _decoded(_text(body.plaintext))

    def secret(self, name: str) -> KmsSecret:
        """See ``Kms``."""
        request = self._models.GetSecretValueRequest(secret_name=name)
        body = self._call(
            lambda: self._client().get_secret_value_with_options(request, self._runtime)
        )
        return secret_of(body.secret_data, body.secret_data_type, body.version_id)

    def close(self) -> None:
        """Nothing is held open."""

    def _client(self) -> Any:
        if self._opened is None:
            key_id, secret = (item.read().reveal().decode("utf-8") for item in self._inputs)
            sdk = load("alibabacloud_kms20160120.client", extra="aliyun")
            openapi = load("alibabacloud_tea_openapi.models", extra="aliyun")
            self._opened = sdk.Client(
                openapi.Config(
                    access_key_id=key_id,
                    access_key_secret=secret,
                    endpoint=self._endpoint,
                    protocol=self._protocol,
                )
            )
        return self._opened

    def _call(self, work: Any) -> Any:
        # Errors of this SDK repeat the request, which holds a key; none of their text goes on.
        try:
            return work().body
        except CaiError:
            raise
        except Exception as error:
            code = getattr(error, "code", None)
            status = getattr(error, "status_code", None)
            kind = type(error).__name__
        if isinstance(code, str) and isinstance(status, int) and status < 500:
            raise KmsRefusal(code[:128])
        raise _unavailable("Alibaba Cloud KMS", kind)


class AliyunKmsProvider:
    """Wraps by a key of KMS.

    Args:
        kms: the way in.
        key: id or alias of a symmetric key.
    """

    def __init__(self, kms: Kms, *, key: str) -> None:
        self.id = f"aliyun-kms:{key}"
        self._kms = kms
        self._key = key

    def wrap(self, key: Secret, context: bytes) -> bytes:
        """See ``KeyProvider``."""
        try:
            return self._kms.encrypt(self._key, bind(key, context))
        except KmsRefusal as error:
            raise _unavailable(f"key provider {self.id}", error.code) from None

    def unwrap(self, wrapped: bytes, context: bytes) -> Secret:
        """See ``KeyProvider``."""
        try:
            data = self._kms.decrypt(self._key, wrapped)
        except KmsRefusal as error:
            if any(part in error.code for part in _BAD_DATA):
                raise Tampered(
                    f"{self.id} does not open a wrapped key: {error.code}",
                    hint="the database was edited, or the key is another's",
                ) from None
            raise _unavailable(f"key provider {self.id}", error.code) from None
        return unbind(data, context, provider=self.id)

    def close(self) -> None:
        """Close the way in."""
        self._kms.close()


def secret_or_none(kms: Kms, name: str, *, source: str) -> KmsSecret | None:
    """A secret; ``None`` when KMS has none of that name.

    Raises:
        Unavailable: KMS does not answer, or says no for another reason.
    """
    try:
        return kms.secret(name)
    except KmsRefusal as error:
        if any(part in error.code for part in _MISSING):
            return None
        raise _unavailable(source, error.code) from None


def secret_of(data: Any, kind: Any, version: Any) -> KmsSecret:
    """A secret from the members of an answer; binary secrets are base64.

    Raises:
        FormatError: a member is missing or of another form.
    """
    text = _text(data)
    contents = _decoded(text) if kind == "binary" else text.encode("utf-8", "replace")
    return KmsSecret(contents, str(version or ""))


def open_kms(section: Section) -> Kms:
    """The way in that a table describes: ``instance`` and ``client_key_file``, or an AccessKey.

    Raises:
        SettingError: neither, both, or a member of another form.
    """
    if section.has("client_key_file"):
        from kbs.keys.aliyun_instance import instance_from_section

        return instance_from_section(section)
    endpoint = section.text("endpoint")
    plain = section.flag("unsafe_plain_http", default=False)
    if "/" in endpoint or (plain and not endpoint.startswith(("127.0.0.1:", "localhost:"))):
        raise SettingError(
            f"{section.where}: endpoint is a host name, and plain HTTP only for loopback",
            hint="e.g. kms.cn-hangzhou.aliyuncs.com",
        )
    return OpenApiKms(
        endpoint,
        access_key_id=SecretInput.from_section(section, "access_key_id", what="access key id"),
        access_key_secret=SecretInput.from_section(
            section, "access_key_secret", what="access key secret"
        ),
        plain_http=plain,
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise FormatError("Alibaba Cloud KMS: the answer lacks a member")
    return value


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError("Alibaba Cloud KMS: the answer is not base64") from error


def _unavailable(what: str, reason: str) -> Unavailable:
    return Unavailable(
        f"{what} is not available: {reason[:128]}",
        hint="check endpoint, credentials and network; nothing was changed",
        code="keys-unavailable",
    )
