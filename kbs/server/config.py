"""Everything that ``kbs serve`` is told: one file, composed of one table for each room.

The file is TOML or YAML by its suffix. Unknown names are refused with the nearest suggestion, so
that a misspelt limit is not a missing one. What stands on the command line wins.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from cai.errors import FormatError, SettingError
from cai.settings import Section, read_settings_file
from kbs.admin.settings import AdminSettings
from kbs.appraisal.settings import AppraisalSettings
from kbs.database.settings import DatabaseSettings
from kbs.keys.settings import KeySettings
from kbs.policy.settings import PolicySettings
from kbs.release.settings import ReleaseSettings
from kbs.resources.settings import ResourceSettings
from kbs.server.settings import (
    Compat,
    HttpSettings,
    LimitSettings,
    TlsSettings,
    optional_path,
)

DATA: Final = Path("kbs-data")
"""Data directory unless told otherwise."""

LISTEN: Final = "127.0.0.1:8080"
"""Main listener unless told otherwise."""


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """What ``kbs serve`` is told.

    Attributes:
        data: data directory.
        listen: ``HOST:PORT`` of the main listener.
        admin_listen: ``HOST:PORT`` or ``unix:PATH`` of the admin listener; empty is ``admin``'s.
        kek: key encryption key file; by default beside ``data``.
        collateral: bundle or directory of Intel's collateral.
        unsafe_simulated_root: directory of a simulator's public parts; the simulated realm.
        rims: directory of NVIDIA's reference measurements.
        ocsp: directory of NVIDIA's revocation answers.
        database: where the state is.
        keys: who wraps keys.
        resources: limits and retention of resources, and which live elsewhere.
        policy: how policies are evaluated.
        release: leases and tickets.
        admin: administrators and their listener.
        attestation: the service under ``/as/``.
        http: paths and status codes.
        limits: what one process takes on.
        tls: certificates.
    """

    data: Path = DATA
    listen: str = LISTEN
    admin_listen: str = ""
    kek: Path | None = None
    collateral: Path | None = None
    unsafe_simulated_root: Path | None = None
    rims: Path | None = None
    ocsp: Path | None = None
    database: DatabaseSettings = field(default_factory=DatabaseSettings)
    keys: KeySettings = field(default_factory=KeySettings)
    policy: PolicySettings = field(default_factory=PolicySettings)
    release: ReleaseSettings = field(default_factory=ReleaseSettings)
    resources: ResourceSettings = field(default_factory=ResourceSettings)
    admin: AdminSettings = field(default_factory=AdminSettings)
    attestation: AppraisalSettings = field(default_factory=AppraisalSettings)
    http: HttpSettings = field(default_factory=HttpSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    tls: TlsSettings = field(default_factory=TlsSettings)

    @property
    def admin_address(self) -> str:
        """Where the admin listener is."""
        return self.admin_listen or self.admin.listen


def read_config(path: Path) -> ServeSettings:
    """Read a configuration file.

    Raises:
        InputMissing, StorageError, LimitExceeded: it cannot be read.
        FormatError: neither TOML nor YAML, as its suffix says.
        SettingError: an unknown name, or a value out of its range.
    """
    data = read_settings_file(path, what="configuration")
    return settings_from(_parsed(data, path), where=path.name)


def settings_from(value: Mapping[str, Any], *, where: str) -> ServeSettings:
    """Compose the settings of a parsed file.

    Raises:
        SettingError: an unknown name, or a value out of its range.
    """
    top = Section(value, where=where)
    evidence = top.section("evidence") or Section({}, where=f"{where}.evidence")
    http = HttpSettings.from_table(top.section("http"))
    settings = ServeSettings(
        data=optional_path(top, "data") or DATA,
        listen=top.text("listen", LISTEN),
        kek=optional_path(top, "kek"),
        collateral=optional_path(evidence, "collateral"),
        rims=optional_path(evidence, "rims"),
        ocsp=optional_path(evidence, "ocsp"),
        unsafe_simulated_root=optional_path(evidence, "unsafe_simulated_root"),
        database=DatabaseSettings.from_table(top.section("database")),
        keys=KeySettings.from_table(top.section("keys")),
        policy=PolicySettings.from_table(top.section("policy")),
        release=ReleaseSettings.from_table(top.section("release")),
        resources=ResourceSettings.from_table(top.section("resources")),
        admin=AdminSettings.from_table(
            top.raw("admin") or {}, compat=http.compat is Compat.TRUSTEE
        ),
        attestation=AppraisalSettings.from_table(top.section("attestation")),
        http=http,
        limits=LimitSettings.from_table(top.section("limits")),
        tls=TlsSettings.from_table(top.section("tls")),
    )
    evidence.finish()
    top.finish()
    return settings


def _parsed(data: bytes, path: Path) -> Mapping[str, Any]:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path.name}: not UTF-8") from error
    value: Any
    match path.suffix:
        case ".toml":
            try:
                value = tomllib.loads(text)
            except (tomllib.TOMLDecodeError, RecursionError) as error:
                raise FormatError(f"{path.name}: {error}") from error
        case ".yaml" | ".yml":
            value = _yaml(text, path.name)
        case _:
            raise SettingError(
                f"{path.name}: the suffix says neither TOML nor YAML",
                hint="name it kbs.toml or kbs.yaml",
            )
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise FormatError(f"{path.name}: expected a table")
    return value


def _yaml(text: str, name: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a safe loader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise FormatError(f"{name}{place}: {problem}") from error


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, without names given twice and without aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases are not served", problem_mark=parent.start_mark if parent else None
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:  # noqa: FBT001, FBT002
        names = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in names:
                raise yaml.MarkedYAMLError(
                    problem="a name is given twice, or is not text", problem_mark=key.start_mark
                )
            names.add(key.value)
        return super().construct_mapping(node, deep)
