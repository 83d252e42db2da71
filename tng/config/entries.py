"""A whole configuration: TNG's grammar, read so that nothing has an effect unseen.

An entry has one mode and, beside it, keys that every mode shares. What TNG reads and this gateway
does not do is read too, and kept as a refusal: ``tng launch`` ends with it, ``tng config check``
explains it (docs/tng-configuration.md).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from cai.errors import SettingError
from cai.settings import Section
from tng.config.addresses import TcpUpstream, is_loopback
from tng.config.guard import Guard, parse_guard
from tng.config.modes import (
    EgressMode,
    HttpProxy,
    IngressMode,
    Mapping,
    Socks5,
    parse_egress_mode,
    parse_ingress_mode,
)
from tng.config.notes import Note, NoteKind, Notes
from tng.config.patterns import compile_pattern
from tng.config.telemetry import Telemetry, parse_telemetry
from tng.config.transport import Transport, parse_transport
from tng.config.trust import Trust, parse_trust

MAX_ENTRIES = 64
"""Most entries of one kind."""

MAX_WORKERS = 64
"""Most worker processes."""


@dataclass(frozen=True, slots=True)
class Ingress:
    """One way in for clients of this machine.

    Attributes:
        name: ``ingress[N]``.
        mode: where connections come in.
        transport: how they travel.
        trust: who proves what.
        padding: whether streamed frames are padded.
    """

    name: str
    mode: IngressMode
    transport: Transport
    trust: Trust
    padding: bool = True

    @property
    def unsafe(self) -> tuple[str, ...]:
        """The ``unsafe_…`` settings in force, and the one of TNG's that sends in clear."""
        direct = isinstance(self.mode, (HttpProxy, Socks5)) and self.mode.direct
        return (*(("on_mismatch: direct",) if direct else ()), *self.trust.unsafe)


@dataclass(frozen=True, slots=True)
class Egress:
    """One way out to a backend of this guest.

    Attributes:
        name: ``egress[N]``.
        mode: where attested connections come in and which backend they reach.
        transport: how they travel.
        trust: who proves what.
        padding: whether streamed frames are padded.
        direct: paths of plain HTTP requests that are let through unprotected.
        remote_upstream: whether the backend may be elsewhere (``unsafe_remote_upstream``).
        guard: what may reach the backend; ``None`` relays bytes as they are.
    """

    name: str
    mode: EgressMode
    transport: Transport
    trust: Trust
    padding: bool = True
    direct: tuple[re.Pattern[str], ...] = ()
    remote_upstream: bool = False
    guard: Guard | None = None

    @property
    def unsafe(self) -> tuple[str, ...]:
        """The ``unsafe_…`` settings in force."""
        remote = ("unsafe_remote_upstream",) if self.remote_upstream else ()
        direct = ("direct_forward",) if self.direct else ()
        guard = self.guard.unsafe if self.guard else ()
        return (*remote, *direct, *guard, *self.trust.unsafe)


@dataclass(frozen=True, slots=True)
class Config:
    """Everything one ``tng launch`` does.

    Attributes:
        ingress: entries of ``add_ingress``.
        egress: entries of ``add_egress``.
        telemetry: control interface, metrics, traces.
        notes: what is worth telling.
        workers: processes behind the same ports.
    """

    ingress: tuple[Ingress, ...]
    egress: tuple[Egress, ...]
    telemetry: Telemetry = field(default_factory=Telemetry)
    notes: tuple[Note, ...] = ()
    workers: int = 1

    @property
    def refusals(self) -> tuple[Note, ...]:
        """What keeps it from being launched."""
        return tuple(note for note in self.notes if note.kind is NoteKind.REFUSED)

    def require_served(self) -> None:
        """Refuse a configuration with anything that this gateway does not do.

        Raises:
            SettingError: naming every such thing.
        """
        if self.refusals:
            raise SettingError(
                "; ".join(str(note) for note in self.refusals),
                hint="`tng config check` explains the whole configuration",
            )


def parse(value: Any, *, where: str) -> Config:
    """Read a parsed configuration.

    Raises:
        SettingError: TNG refuses it too, or it would protect nothing.
    """
    if not isinstance(value, dict):
        raise SettingError(f"{where}: expected an object with add_ingress or add_egress")
    top = Section(value, where=where)
    notes = Notes()
    telemetry = parse_telemetry(top, notes)
    ingress = tuple(
        _ingress(Section(entry, where=f"add_ingress[{index}]"), index, notes)
        for index, entry in enumerate(_entries(top, "add_ingress"))
    )
    egress = tuple(
        _egress(Section(entry, where=f"add_egress[{index}]"), index, notes)
        for index, entry in enumerate(_entries(top, "add_egress"))
    )
    workers = top.integer("workers", 1, least=1, most=MAX_WORKERS, unit="processes")
    top.finish()
    if not ingress and not egress:
        raise SettingError(
            f"{where}: nothing to do", hint="give at least one entry of add_ingress or add_egress"
        )
    return Config(ingress, egress, telemetry, notes.all(), workers)


def _ingress(entry: Section, index: int, notes: Notes) -> Ingress:
    mode = parse_ingress_mode(entry, notes)
    trust = parse_trust(entry, notes)
    if trust.verify is None and trust.attest is not None:
        notes.add(NoteKind.CLEAR, entry.where, "without verify it sends to whoever answers")
    if entry.flag("web_page_inject", default=False):
        raise SettingError(f"{entry.where}: web_page_inject is not done by any version")
    transport = parse_transport(entry, notes, egress=False)
    padding = _padding(entry)
    entry.finish()
    return Ingress(f"ingress[{index}]", mode, transport, trust, padding)


def _egress(entry: Section, index: int, notes: Notes) -> Egress:
    mode = parse_egress_mode(entry, notes)
    trust = parse_trust(entry, notes)
    transport = parse_transport(entry, notes, egress=True)
    direct = _direct(entry, notes)
    remote = entry.flag("unsafe_remote_upstream", default=False)
    padding = _padding(entry)
    guard = parse_guard(entry.section("guard"), notes)
    if guard is not None and direct:
        raise SettingError(
            f"{entry.where}: direct_forward would lead around the guard",
            hint="name the paths in guard.paths, and let clients come through an ingress",
        )
    entry.finish()
    if isinstance(mode, Mapping) and not remote:
        _demand_local(mode, entry.where, notes)
    return Egress(
        f"egress[{index}]", mode, transport, trust, padding, direct, remote, guard
    )


def _demand_local(mode: Mapping, where: str, notes: Notes) -> None:
    for rule in mode.rules:
        for target in rule.targets:
            if isinstance(target, TcpUpstream) and not is_loopback(target.host):
                notes.add(
                    NoteKind.REFUSED, where,
                    f"the backend {target} is not of this guest: it would get the plain text over "
                    "a network; use loopback or a Unix socket, or say unsafe_remote_upstream: true",
                )  # fmt: skip
                return


def _direct(entry: Section, notes: Notes) -> tuple[re.Pattern[str], ...]:
    raw = entry.raw("direct_forward")
    old = entry.section("ohttp") or entry.section("decap_from_http")
    older = old.raw("allow_non_tng_traffic_regexes") if old is not None else None
    if raw is not None and older is not None:
        raise SettingError(
            f"{entry.where}: direct_forward and allow_non_tng_traffic_regexes exclude each other"
        )
    if not isinstance(raw if raw is not None else [], list):
        raise SettingError(f"{entry.where}: direct_forward must be a list")
    patterns: list[re.Pattern[str]] = []
    for index, item in enumerate(raw or []):
        rule = Section(item, where=f"{entry.where}.direct_forward[{index}]")
        patterns.append(compile_pattern(rule.text("http_path"), f"{rule.where}: http_path"))
        rule.finish()
    patterns += [compile_pattern(text, entry.where) for text in older or []]
    if patterns:
        notes.add(
            NoteKind.CLEAR, entry.where,
            "plain requests whose whole path matches direct_forward are answered unprotected",
        )  # fmt: skip
    return tuple(patterns)


def _padding(entry: Section) -> bool:
    value = entry.text("padding", "bucket")
    if value not in ("bucket", "off"):
        raise SettingError(f"{entry.where}: padding is {value!r}, expected 'bucket' or 'off'")
    return value == "bucket"


def _entries(top: Section, name: str) -> list[Any]:
    # Unlike elsewhere in the schema, a null is not an absent list.
    raw = top.raw(name) if top.holds(name) else []
    if not isinstance(raw, list) or len(raw) > MAX_ENTRIES:
        raise SettingError(f"{top.where}: {name} must be a list of at most {MAX_ENTRIES} entries")
    return raw
