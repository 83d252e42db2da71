"""Who wraps the keys, as the configuration says it; never with a secret in it.

``[keys.providers.NAME]`` describes a provider, ``[keys] provider`` names the one that a new
database starts with and that ``kbs key rotate`` goes to. While a rotation from one to another is
under way both are described. Without any of it there is one, called ``file``: the key encryption
key beside the data directory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from cai.errors import SettingError
from cai.settings import Section, suggestion
from kbs.keys.aliyun import AliyunKmsProvider, Kms, open_kms
from kbs.keys.file_provider import FileProvider
from kbs.keys.keyring import Keyring
from kbs.keys.passphrase_provider import PassphraseProvider
from kbs.keys.pkcs11_provider import Mechanism, Pkcs11Provider, TokenKey
from kbs.keys.sealing import require_outside
from kbs.keys.secret_input import SecretInput
from kbs.keys.vault import VaultAddress, VaultTransitProvider, name_setting

if TYPE_CHECKING:
    from kbs.keys.provider import KeyProvider

FILE: Final = "file"
"""Name and kind of the provider that is there without configuration."""


class ProviderSettings(Protocol):
    """One described provider."""

    def open(self, name: str, *, data: Path, create: bool) -> KeyProvider:
        """The provider.

        Args:
            name: as the configuration calls it.
            data: the data directory; no key may lie in it.
            create: make a missing key, for a new database.

        Raises:
            CaiError: it cannot be used as described.
        """
        ...


@dataclass(frozen=True, slots=True)
class FileSettings:
    """A key in a file.

    Attributes:
        path: 64 hex digits, 0400, in a directory of its own.
    """

    path: Path

    @classmethod
    def from_table(cls, section: Section) -> FileSettings:
        """Read a provider of kind ``file``."""
        return cls(Path(section.text("path")))

    def open(self, name: str, *, data: Path, create: bool) -> KeyProvider:
        """See ``ProviderSettings``."""
        del name
        require_outside(self.path, data)
        return FileProvider.open(self.path, create=create)


@dataclass(frozen=True, slots=True)
class PassphraseSettings:
    """A key derived from a passphrase.

    Attributes:
        passphrase: where it comes from.
    """

    passphrase: SecretInput

    @classmethod
    def from_table(cls, section: Section) -> PassphraseSettings:
        """Read a provider of kind ``passphrase``."""
        return cls(SecretInput.from_section(section, "passphrase", what="passphrase"))

    def open(self, name: str, *, data: Path, create: bool) -> KeyProvider:
        """See ``ProviderSettings``."""
        del create
        if self.passphrase.file is not None:
            require_outside(self.passphrase.file, data)
        return PassphraseProvider(name, self.passphrase)


@dataclass(frozen=True, slots=True)
class Pkcs11Settings:
    """A key on a hardware module.

    Attributes:
        where: the token and the key.
    """

    where: TokenKey

    @classmethod
    def from_table(cls, section: Section) -> Pkcs11Settings:
        """Read a provider of kind ``pkcs11``."""
        text = section.text("mechanism", Mechanism.AES_GCM.value)
        if text not in list(Mechanism):
            raise SettingError(
                f"{section.where}: unknown mechanism {text!r}",
                hint=f"known are: {', '.join(Mechanism)}",
            )
        return cls(
            TokenKey(
                Path(section.text("module")),
                section.text("token"),
                section.text("key"),
                SecretInput.from_section(section, "pin", what="PIN"),
                Mechanism(text),
                section.flag("unsafe_extractable_key", default=False),
            )
        )

    def open(self, name: str, *, data: Path, create: bool) -> KeyProvider:
        """See ``ProviderSettings``."""
        del name, data, create
        return Pkcs11Provider(self.where)


@dataclass(frozen=True, slots=True)
class VaultSettings:
    """A key of Vault's transit engine.

    Attributes:
        address: where Vault is.
        mount: path of the engine.
        key: name of the key.
    """

    address: VaultAddress
    mount: str
    key: str

    @classmethod
    def from_table(cls, section: Section) -> VaultSettings:
        """Read a provider of kind ``vault-transit``."""
        address = VaultAddress.from_section(section)
        return cls(address, name_setting(section, "mount", "transit"), name_setting(section, "key"))

    def open(self, name: str, *, data: Path, create: bool) -> KeyProvider:
        """See ``ProviderSettings``."""
        del name, data, create
        return VaultTransitProvider(self.address, mount=self.mount, key=self.key)


@dataclass(frozen=True, slots=True)
class AliyunSettings:
    """A key of Alibaba Cloud KMS.

    Attributes:
        kms: the way in; the configuration alone opens no connection.
        key: id or alias of the key.
    """

    kms: Kms
    key: str

    @classmethod
    def from_table(cls, section: Section) -> AliyunSettings:
        """Read a provider of kind ``aliyun-kms``."""
        return cls(open_kms(section), section.text("key"))

    def open(self, name: str, *, data: Path, create: bool) -> KeyProvider:
        """See ``ProviderSettings``."""
        del name, data, create
        return AliyunKmsProvider(self.kms, key=self.key)


_KINDS: Final[dict[str, Callable[[Section], ProviderSettings]]] = {
    FILE: FileSettings.from_table,
    "passphrase": PassphraseSettings.from_table,
    "pkcs11": Pkcs11Settings.from_table,
    "vault-transit": VaultSettings.from_table,
    "aliyun-kms": AliyunSettings.from_table,
}


@dataclass(frozen=True, slots=True)
class KeySettings:
    """The key providers.

    Attributes:
        provider: name of the one that wraps what is new; empty is ``file``.
        providers: the described ones by name.
    """

    provider: str = ""
    providers: Mapping[str, ProviderSettings] = field(default_factory=dict)

    @classmethod
    def from_table(cls, section: Section | None) -> KeySettings:
        """Read ``[keys]``.

        Raises:
            SettingError: an unknown member or kind, or one out of its range.
        """
        if section is None:
            return cls()
        provider = section.text("provider", "")
        providers = {}
        described = section.section("providers")
        if described is not None:
            names = section.raw("providers")
            for name in names:
                item = described.section(name)
                if item is not None:
                    providers[name] = _provider(item)
        section.finish()
        if provider and provider != FILE and provider not in providers:
            raise SettingError(
                f"{section.where}: no provider is called {provider!r}",
                hint=suggestion(provider, providers) or "describe it in [keys.providers.NAME]",
            )
        return cls(provider, providers)

    def open(self, kek_file: Path, *, data: Path, create: bool) -> Keyring:
        """Every provider, ready for use.

        Args:
            kek_file: the key of the provider ``file``, unless that is described too.
            data: the data directory; no key may lie in it.
            create: make a missing key of the provider in force, for a new database.

        Raises:
            CaiError: one cannot be used as described.
        """
        wanted = self.provider or FILE
        described: dict[str, ProviderSettings] = dict(self.providers)
        if FILE not in described and (wanted == FILE or kek_file.exists()):
            described[FILE] = FileSettings(kek_file)
        opened = {
            name: settings.open(name, data=data, create=create and name == wanted)
            for name, settings in described.items()
        }
        return Keyring(opened, wanted)


def _provider(section: Section) -> ProviderSettings:
    kind = section.text("kind")
    if kind not in _KINDS:
        raise SettingError(
            f"{section.where}: unknown kind {kind!r}",
            hint=suggestion(kind, _KINDS) or f"known are: {', '.join(_KINDS)}",
        )
    settings = _KINDS[kind](section)
    section.finish()
    return settings
