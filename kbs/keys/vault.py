"""HashiCorp Vault, or OpenBao: one client for the transit engine and for secrets.

The token comes from a file that is read for each call, so that a Vault agent may renew it there.
TLS is always verified; plain HTTP is for a loopback address only. Nothing of the environment
(``VAULT_ADDR``, proxies) is looked at.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from cai.errors import CaiError, FormatError, SettingError, Tampered, Unavailable
from cai.secret import Secret
from cai.settings import Section
from kbs.keys.optional import load
from kbs.keys.provider import bind, unbind
from kbs.keys.secret_input import SecretInput

TIMEOUT_SECONDS: Final = 10
"""How long one call may take, seconds."""

MAX_NAME: Final = 256
"""Longest mount, key or namespace, characters."""

_CIPHERTEXT: Final = "vault:v"


@dataclass(frozen=True, slots=True)
class VaultAddress:
    """One Vault and how to talk to it.

    Attributes:
        url: ``https://HOST:PORT``.
        token: where the token comes from.
        namespace: of Vault Enterprise or OpenBao; may be empty.
        ca_file: certificates that its server certificate must come from; ``None`` is the system's.
    """

    url: str
    token: SecretInput
    namespace: str = ""
    ca_file: Path | None = None

    @classmethod
    def from_section(cls, section: Section) -> VaultAddress:
        """Read ``url``, ``token_file`` or ``token_fd``, ``namespace`` and ``ca_file``.

        Raises:
            SettingError: a member is missing, or the address would carry keys in clear.
        """
        url = section.text("url").rstrip("/")
        require_private_url(url, where=section.where)
        ca_file = section.text("ca_file", "")
        return cls(
            url,
            SecretInput.from_section(section, "token", what="Vault token"),
            section.text("namespace", ""),
            Path(ca_file) if ca_file else None,
        )


def require_private_url(url: str, *, where: str) -> None:
    """Refuse an address that would carry keys in clear over a network.

    Raises:
        SettingError: neither HTTPS nor a loopback address.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        loopback = host == "localhost" or (bool(host) and _is_loopback(host))
    except ValueError as error:
        raise SettingError(f"{where}: url is not a URL") from error
    if not host or parts.username or parts.query or parts.fragment:
        raise SettingError(f"{where}: url is not an address of a service")
    if parts.scheme != "https" and not (parts.scheme == "http" and loopback):
        raise SettingError(
            f"{where}: {parts.scheme}://{host} would carry keys in clear", hint="use https"
        )


class VaultClient:
    """Calls one Vault.

    Args:
        address: where it is.

    Raises:
        SettingError: hvac is not installed.
    """

    def __init__(self, address: VaultAddress) -> None:
        hvac = load("hvac", extra="vault")
        requests = load("requests", extra="vault")
        self._errors = hvac.exceptions
        self._requests = requests
        self._address = address
        session = requests.Session()
        session.trust_env = False
        self._client = hvac.Client(
            url=address.url,
            token="",
            verify=True if address.ca_file is None else str(address.ca_file),
            timeout=TIMEOUT_SECONDS,
            allow_redirects=False,
            session=session,
            namespace=address.namespace or None,
        )

    def call(self, what: str, work: Any) -> Any:
        """Do one call with a fresh token.

        Args:
            what: names it in errors, e.g. ``"transit/keys"``.
            work: gets the hvac client and returns its answer.

        Returns:
            The answer's ``data``; ``None`` when the path does not exist.

        Raises:
            FormatError: Vault says that what it was sent is malformed, or the answer is.
            Unavailable: it cannot be reached, is sealed, or refuses the token.
        """
        errors, requests = self._errors, self._requests
        self._client.token = self._address.token.read().reveal().decode("utf-8", "replace")
        try:
            answer = work(self._client)
        except errors.InvalidPath:
            return None
        except errors.InvalidRequest as error:
            # Vault's own words may repeat what was sent.
            raise FormatError(f"{what}: Vault refuses the request") from error
        except (errors.Forbidden, errors.Unauthorized) as error:
            raise _unavailable(
                f"{what}: Vault refuses the token", "renew it, or check its policy"
            ) from error
        except errors.VaultError as error:
            raise _unavailable(
                f"{what}: Vault answers {type(error).__name__}", "is it sealed or overloaded?"
            ) from error
        except (requests.RequestException, OSError) as error:
            raise _unavailable(
                f"{what}: no Vault answers: {type(error).__name__}", "check url and network"
            ) from error
        except ValueError as error:
            raise FormatError(f"{what}: Vault's answer is not JSON") from error
        data = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(data, dict):
            raise FormatError(f"{what}: Vault's answer has no data")
        return data

    def close(self) -> None:
        """Close the connections."""
        self._client.adapter.close()


class VaultTransitProvider:
    """Wraps by a key of Vault's transit engine, which never leaves Vault.

    Args:
        address: where Vault is.
        mount: path of the engine.
        key: name of an encryption key of a type that authenticates (the default, aes256-gcm96).
    """

    def __init__(self, address: VaultAddress, *, mount: str, key: str) -> None:
        self.id = "vault-transit:" + "/".join(
            part for part in (address.namespace, mount, key) if part
        )
        self._mount = mount
        self._key = key
        self._client = VaultClient(address)

    def wrap(self, key: Secret, context: bytes) -> bytes:
        """See ``KeyProvider``; ``vault:v<version>:…`` is stored."""
        plaintext = base64.b64encode(bind(key, context)).decode("ascii")
        data = self._call(
            lambda client: client.secrets.transit.encrypt_data(
                self._key, plaintext=plaintext, mount_point=self._mount
            )
        )
        ciphertext = data.get("ciphertext")
        if not isinstance(ciphertext, str) or not ciphertext.startswith(_CIPHERTEXT):
            raise FormatError(f"{self.id}: Vault's answer has no ciphertext")
        try:
            return ciphertext.encode("ascii")
        except UnicodeEncodeError as error:
            raise FormatError(f"{self.id}: Vault's ciphertext is not ASCII") from error

    def unwrap(self, wrapped: bytes, context: bytes) -> Secret:
        """See ``KeyProvider``."""
        text = wrapped.decode("latin-1")
        if not text.startswith(_CIPHERTEXT) or not text.isascii():
            raise Tampered(f"a key wrapped by {self.id} is not Vault's ciphertext")
        try:
            data = self._call(
                lambda client: client.secrets.transit.decrypt_data(
                    self._key, ciphertext=text, mount_point=self._mount
                )
            )
        except FormatError as error:
            raise Tampered(
                f"{self.id} does not open a wrapped key",
                hint="the database was edited, or Vault no longer keeps that key version",
            ) from error
        try:
            plain = base64.b64decode(data.get("plaintext", ""), validate=True)
        except (binascii.Error, ValueError, TypeError) as error:
            raise FormatError(f"{self.id}: Vault's answer has no plaintext") from error
        return unbind(plain, context, provider=self.id)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _call(self, work: Any) -> dict[str, Any]:
        data: dict[str, Any] | None = self._client.call(f"key provider {self.id}", work)
        if data is None:
            raise _unavailable(
                f"key provider {self.id}: Vault has no such key", "check mount and key"
            )
        return data


def name_setting(section: Section, name: str, default: str | None = None) -> str:
    """A mount, key or path member: a plain path without ``..``.

    Raises:
        SettingError: another form.
    """
    value = section.text(name, default).strip("/")
    parts = value.split("/")
    if not value or len(value) > MAX_NAME or any(part in ("", ".", "..") for part in parts):
        raise SettingError(f"{section.where}: {name} is not a path")
    return value


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _unavailable(message: str, hint: str) -> CaiError:
    return Unavailable(message, hint=f"{hint}; nothing was changed", code="keys-unavailable")
