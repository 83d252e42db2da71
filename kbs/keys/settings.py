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
from kbs.keys.file_provider import FileProvider
from kbs.keys.keyring import Keyring
from kbs.keys.sealing import require_outside

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


_KINDS: Final[dict[str, Callable[[Section], ProviderSettings]]] = {
    FILE: FileSettings.from_table,
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
