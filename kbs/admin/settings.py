"""The section ``[admin]`` of the broker's settings: who may administer it, where, and how many.

.. code-block:: toml

    [admin]
    listen = "unix:/run/kbs/admin.sock"
    max_token_seconds = 3600

    [[admin.identity_providers]]
    name = "corp"
    issuer = "https://login.example.org"
    audience = "KBS"
    key = "/etc/kbs/corp.jwks"
    roles = { "kbs-auditors" = ["auditor"], "kbs-owners" = ["resource", "policy"] }

    [[admin.legacy_keys]]
    name = "keyprovider"
    key = "/etc/kbs/keyprovider.pub"
    roles = ["resource"]

    [admin.two_person]
    required = 2
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cai.errors import SettingError
from cai.settings import Section, refuse_unknown
from kbs.admin.changes import Role
from kbs.names import KBS_AUDIENCE

MAX_TOKEN_SECONDS = 3600
"""Longest time that an administrator's token may still be valid for unless told otherwise, s."""

LEGACY_TOKEN_SECONDS = 3 * 3600
"""Longest time that a legacy token may still be valid for, s; stock clients sign for two hours."""

PROPOSAL_HOURS = 72
"""How long a proposal waits unless told otherwise, hours."""

MAX_REQUIRED = 16
"""Most persons that a change can need."""

LISTEN: Final = "127.0.0.1:8081"
"""Where the admin listener is unless told otherwise."""

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,31}", re.ASCII)


@dataclass(frozen=True, slots=True)
class IdentityProvider:
    """A pinned issuer of administrators' tokens.

    Attributes:
        name: short; persons are known as ``<name>:<sub>``.
        issuer: exact ``iss``.
        audience: must be in ``aud``.
        key: PEM public keys or a JWK set; read at start.
        roles: what a value of the claim gives; empty: the claim names our roles themselves.
        claim: the claim that holds roles or groups, a string or a list of strings.
        tenant: the tenant that its persons are confined to; ``""`` is the whole broker.
        max_token_seconds: longest time that a token may still be valid for.
    """

    name: str
    issuer: str
    audience: str
    key: Path
    roles: Mapping[str, frozenset[Role]] = field(default_factory=dict)
    claim: str = "role"
    tenant: str = ""
    max_token_seconds: int = MAX_TOKEN_SECONDS


@dataclass(frozen=True, slots=True)
class LegacyKey:
    """A key whose tokens need no role, as older Trustee clients make them.

    Attributes:
        name: the person is known as ``legacy:<name>``.
        key: PEM file of the Ed25519 public key.
        roles: what its tokens may do.
        tenant: the tenant that it is confined to; ``""`` is the whole broker.
    """

    name: str
    key: Path
    roles: frozenset[Role] = frozenset({Role.ADMIN})
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class TwoPerson:
    """Changes need signatures of several distinct persons.

    Attributes:
        required: how many persons must sign.
        proposer_counts: the one who proposes may be one of them; otherwise all are others.
        approvers: the persons who may sign; empty: everybody with the change's role.
        hours: how long a proposal waits.
    """

    required: int = 2
    proposer_counts: bool = True
    approvers: tuple[str, ...] = ()
    hours: int = PROPOSAL_HOURS


@dataclass(frozen=True, slots=True)
class AdminSettings:
    """Section ``[admin]``.

    Attributes:
        listen: ``HOST:PORT``, or ``unix:PATH`` (0600).
        on_main_listener: admin routes are mounted on the main listener too.
        certificate: PEM chain; needed where ``listen`` is not loopback or a Unix socket.
        private_key: its PEM private key.
        max_token_seconds: longest time that an administrator's own token may still be valid for.
        identity_providers: issuers of tokens besides the keys stored here.
        legacy_keys: keys whose tokens need no role.
        two_person: the rule; ``None`` when it is off.
    """

    listen: str = LISTEN
    on_main_listener: bool = False
    certificate: Path | None = None
    private_key: Path | None = None
    max_token_seconds: int = MAX_TOKEN_SECONDS
    identity_providers: tuple[IdentityProvider, ...] = ()
    legacy_keys: tuple[LegacyKey, ...] = ()
    two_person: TwoPerson | None = None

    @classmethod
    def from_table(cls, table: Mapping[str, Any], *, compat: bool = False) -> AdminSettings:
        """Read the section; every member may be absent.

        Args:
            table: the parsed section.
            compat: ``compat: trustee`` is set, so that stock clients find the admin routes.

        Raises:
            SettingError: an unknown or unsound setting.
        """
        section = Section(table, where="[admin]")
        settings = cls(
            listen=section.text("listen", LISTEN),
            on_main_listener=section.flag("on_main_listener", default=compat),
            certificate=_path(section, "certificate"),
            private_key=_path(section, "private_key"),
            max_token_seconds=section.integer(
                "max_token_seconds", MAX_TOKEN_SECONDS, least=60, most=86400, unit="seconds"
            ),
            identity_providers=tuple(map(_provider, _tables(section, "identity_providers"))),
            legacy_keys=tuple(map(_legacy_key, _tables(section, "legacy_keys"))),
            two_person=_two_person(section.section("two_person")),
        )
        section.finish()
        if (settings.certificate is None) is not (settings.private_key is None):
            raise SettingError("[admin]: certificate and private_key come together")
        names = [provider.name for provider in settings.identity_providers]
        names += [key.name for key in settings.legacy_keys]
        if len(set(names)) != len(names):
            raise SettingError("[admin]: two providers or keys have the same name")
        issuers = [provider.issuer for provider in settings.identity_providers]
        if len(set(issuers)) != len(issuers):
            raise SettingError("[admin]: two identity providers have the same issuer")
        return settings


def parse_roles(names: list[str], *, where: str) -> frozenset[Role]:
    """Read a list of role names.

    Raises:
        SettingError: an unknown name, or none at all.
    """
    refuse_unknown(names, list(Role), where=where)
    if not names:
        raise SettingError(f"{where}: name at least one role", hint=", ".join(Role))
    return frozenset(map(Role, names))


def _provider(section: Section) -> IdentityProvider:
    mapped = section.section("roles")
    roles: dict[str, frozenset[Role]] = {}
    if mapped is not None:
        table = section.raw("roles")
        for value in table:
            roles[value] = parse_roles(mapped.texts(value), where=f"{mapped.where}.{value}")
    provider = IdentityProvider(
        name=_name(section),
        issuer=_filled(section, "issuer"),
        audience=section.text("audience", KBS_AUDIENCE),
        key=Path(_filled(section, "key")),
        roles=roles,
        claim=section.text("claim", "role"),
        tenant=section.text("tenant", ""),
        max_token_seconds=section.integer(
            "max_token_seconds", MAX_TOKEN_SECONDS, least=60, most=86400, unit="seconds"
        ),
    )
    section.finish()
    return provider


def _legacy_key(section: Section) -> LegacyKey:
    key = LegacyKey(
        name=_name(section),
        key=Path(_filled(section, "key")),
        roles=parse_roles(section.texts("roles", ["admin"]), where=f"{section.where}.roles"),
        tenant=section.text("tenant", ""),
    )
    section.finish()
    return key


def _two_person(section: Section | None) -> TwoPerson | None:
    if section is None:
        return None
    rule = TwoPerson(
        required=section.integer("required", 2, least=2, most=MAX_REQUIRED, unit="persons"),
        proposer_counts=section.flag("proposer_counts", default=True),
        approvers=tuple(section.texts("approvers", [])),
        hours=section.integer("hours", PROPOSAL_HOURS, least=1, most=24 * 90, unit="hours"),
    )
    section.finish()
    if len(set(rule.approvers)) != len(rule.approvers):
        raise SettingError(f"{section.where}: approvers names a person twice")
    if rule.approvers and len(rule.approvers) < rule.required:
        raise SettingError(
            f"{section.where}: {rule.required} signatures are required of"
            f" {len(rule.approvers)} approvers"
        )
    return rule


def _tables(section: Section, name: str) -> list[Section]:
    values = section.raw(name)
    if values is None:
        return []
    if not isinstance(values, list):
        raise SettingError(f"{section.where}: {name} must be a list of tables")
    return [
        Section(value, where=f"{section.where}.{name}[{number}]")
        for number, value in enumerate(values)
    ]


def _name(section: Section) -> str:
    name = section.text("name")
    if not _NAME.fullmatch(name):
        raise SettingError(f"{section.where}: name must be up to 32 of a-z, 0-9, '_', '.', '-'")
    return name


def _filled(section: Section, name: str) -> str:
    value = section.text(name)
    if not value:
        raise SettingError(f"{section.where}: {name} is empty")
    return value


def _path(section: Section, name: str) -> Path | None:
    return Path(_filled(section, name)) if section.has(name) else None
