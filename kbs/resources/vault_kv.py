"""Resources that a Vault keeps in its key-value engine, version 1 or 2."""

from __future__ import annotations

import base64
import binascii
from typing import Any, Final

from cai.errors import FormatError, SettingError
from cai.settings import Section
from kbs.keys.vault import VaultAddress, VaultClient, name_setting
from kbs.names import ResourceName
from kbs.resources.external import Naming, SourceSecret, secret_name

ENCODINGS: Final = ("text", "base64", "hex")
"""What a field's text stands for; Vault keeps no bytes."""


class VaultKv:
    """Reads secrets of one engine.

    Args:
        address: where Vault is.
        mount: path of the engine.
        version: 1 or 2.
        naming: by the tag alone or by the whole path.
        field: the member of the secret that is released.
        encoding: what that member's text stands for.
    """

    def __init__(
        self, address: VaultAddress, *, mount: str, version: int, naming: Naming, field: str,
        encoding: str,
    ) -> None:
        self.id = f"vault-kv:{mount}"
        self._client = VaultClient(address)
        self._mount = mount
        self._version = version
        self._naming = naming
        self._field = field
        self._encoding = encoding

    @classmethod
    def from_section(cls, section: Section) -> VaultKv:
        """Read a source of kind ``vault-kv``.

        Raises:
            SettingError: a member is missing or of another form.
        """
        encoding = section.text("encoding", "text")
        if encoding not in ENCODINGS:
            raise SettingError(
                f"{section.where}: unknown encoding {encoding!r}",
                hint=f"known are: {', '.join(ENCODINGS)}",
            )
        return cls(
            VaultAddress.from_section(section),
            mount=name_setting(section, "mount", "secret"),
            version=section.integer("kv_version", 2, least=1, most=2, unit="versions"),
            naming=Naming.from_section(section),
            field=section.text("field", "value"),
            encoding=encoding,
        )

    def read(self, name: ResourceName) -> SourceSecret | None:
        """See ``SecretSource``."""
        path = secret_name(name, self._naming)
        data = self._client.call(f"{self.id}/{path}", lambda client: self._ask(client, path))
        version = ""
        if data is not None and self._version == 2:
            metadata = data.get("metadata")
            version = str(metadata.get("version", "")) if isinstance(metadata, dict) else ""
            data = data.get("data")
        if data is None:
            return None
        text = data.get(self._field) if isinstance(data, dict) else None
        if not isinstance(text, str):
            raise FormatError(f"{self.id}/{path}: no text in the field {self._field!r}")
        return SourceSecret(self._decoded(text, path), version)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _ask(self, client: Any, path: str) -> Any:
        if self._version == 1:
            return client.secrets.kv.v1.read_secret(path, mount_point=self._mount)
        return client.secrets.kv.v2.read_secret_version(
            path, mount_point=self._mount, raise_on_deleted_version=True
        )

    def _decoded(self, text: str, path: str) -> bytes:
        try:
            match self._encoding:
                case "base64":
                    return base64.b64decode(text, validate=True)
                case "hex":
                    return bytes.fromhex(text)
                case _:
                    return text.encode("utf-8")
        except (binascii.Error, ValueError) as error:
            raise FormatError(f"{self.id}/{path}: the field is not {self._encoding}") from error
