"""The providers that a broker knows, by the ids that stored keys name."""

from __future__ import annotations

from collections.abc import Mapping

from cai.errors import InputMissing, SettingError, Tampered, Unavailable, WrongKey
from cai.secret import Secret
from cai.settings import suggestion
from kbs.keys.provider import MAX_WRAPPED, KeyProvider, WrappedKey


class Keyring:
    """Several providers; one of them wraps what is new.

    Args:
        providers: by the name that the configuration gives each.
        default: the name of the one that a new database starts with, and that a rotation without
            a target goes to.
    """

    def __init__(self, providers: Mapping[str, KeyProvider], default: str) -> None:
        self._named = dict(providers)
        self._by_id = {provider.id: provider for provider in self._named.values()}
        if len(self._by_id) != len(self._named):
            raise SettingError(
                "two key providers of the configuration are the same one",
                hint="describe each key once",
            )
        self.default = default
        self.named(default)

    @classmethod
    def of(cls, provider: KeyProvider) -> Keyring:
        """A keyring of one."""
        return cls({"default": provider}, "default")

    @property
    def names(self) -> dict[str, str]:
        """Ids of the providers by their configured names."""
        return {name: provider.id for name, provider in self._named.items()}

    def named(self, name: str) -> KeyProvider:
        """The provider that the configuration calls so.

        Raises:
            InputMissing: none.
        """
        if name not in self._named:
            raise InputMissing(
                f"no key provider is called {name[:64]!r}",
                hint=suggestion(name, self._named) or f"known are: {', '.join(self._named)}",
            )
        return self._named[name]

    def provider(self, provider_id: str) -> KeyProvider:
        """The provider with this id.

        Raises:
            Unavailable: it is not configured here.
        """
        found = self._by_id.get(provider_id)
        if found is None:
            raise Unavailable(
                f"key provider {provider_id} is not configured",
                hint="add it to [keys], or rotate with a broker that still knows it",
                code="keys-unavailable",
            )
        return found

    def wrap(self, provider_id: str, key: Secret, context: bytes) -> WrappedKey:
        """Wrap a key by one provider.

        Raises:
            CaiError: as that provider says.
        """
        blob = self.provider(provider_id).wrap(key, context)
        if not 0 < len(blob) <= MAX_WRAPPED:
            raise WrongKey(f"key provider {provider_id} wraps to {len(blob)} bytes")
        return WrappedKey(provider_id, blob)

    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Secret:
        """Unwrap a key by the provider that it names.

        Raises:
            CaiError: as that provider says.
        """
        if len(wrapped.blob) > MAX_WRAPPED:
            raise Tampered("a wrapped key is too long", hint="the database was edited")
        return self.provider(wrapped.provider).unwrap(wrapped.blob, context)

    def close(self) -> None:
        """Close every provider."""
        for provider in self._named.values():
            provider.close()
