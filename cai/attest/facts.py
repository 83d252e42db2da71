"""What verification established about a guest: the input of every policy.

Facts exist only after every hard check has passed. A key broker stores them in its session and
appraises them again at each request, so they survive a round trip through JSON; and they are handed
to Rego under the names that Trustee gives its claims, so that policies written for it keep working.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from cai.attest.statement import ChannelStatement, ReleaseStatement, ServedModel
from cai.attest.tdx.facts import TdxFacts, texts_by_name
from cai.errors import FormatError, SettingError
from cai.settings import Section

__all__ = ["CPU", "DeviceFacts", "Facts", "TdxFacts"]

MAX_FACTS = 512 * 1024
"""Largest JSON of facts that is worth storing, bytes; 16 devices stay below it."""

EVENT_MEMBERS = {
    "index", "type_name", "event", "digests", "digest_matches_event", "details",
}  # fmt: skip
"""Members of one claim of an event log."""

CPU = "cpu0"
"""Trustee's name of the CPU submodule of a token."""


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What the verified report of one GPU or NVSwitch says.

    Attributes:
        arch: ``HOPPER``, ``BLACKWELL``, or ``LS10`` for a switch, as the certificate has it.
        hwmodel: common name of the certificate above the leaf, e.g. ``GH100 A01 GSP BROM``.
        ueid: serial number of the leaf, decimal, as NVIDIA spells it.
        driver_version: e.g. ``580.95.05``; empty for a switch.
        vbios_version: e.g. ``96.00.74.00.1A``.
        fwid: digest of the firmware that holds the signing key, 96 hex digits; empty when the
            report does not name it.
        measurements: block index, decimal, to digest in hex.
        mode: feature flag, decimal; empty when the report has none. ``2`` is a member of a
            complete protected-PCIe system.
        rims: role (``driver``, ``vbios``, ``switch``) to the SHA-256 of the reference file with
            which every active measurement was equal; empty when none was compared.
        rim_expires: RFC 3339 time at which the first of these files expires.
        ocsp_produced: RFC 3339 ``thisUpdate`` of the oldest answer about the certificates behind
            this device and its reference files; empty when revocation was not asked for all.
    """

    arch: str
    hwmodel: str
    ueid: str
    driver_version: str
    vbios_version: str
    fwid: str
    measurements: Mapping[str, str]
    mode: str = ""
    rims: Mapping[str, str] = field(default_factory=dict)
    rim_expires: str = ""
    ocsp_produced: str = ""

    @property
    def is_switch(self) -> bool:
        """An NVSwitch, which no count of GPUs includes."""
        return self.arch == "LS10"

    def claims(self) -> dict[str, object]:
        """The facts as Trustee's local ``nvidia`` claims, with model and identity beside them."""
        return {
            "arch": self.arch.capitalize(),
            "hwmodel": self.hwmodel,
            "ueid": self.ueid,
            "measurements": dict(self.measurements),
            "config": {
                "driver_version": self.driver_version,
                "vbios_version": self.vbios_version,
                "fwid": self.fwid,
            },
        }


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that was established about one guest.

    Attributes:
        tdx: from the quote.
        devices: from the GPU reports, in the order of the evidence.
        gpu_digest: ``gpu_evidence_digest`` of the evidence, hex.
        simulated: some root was a simulator's.
        launch_digest: from a statement whose binding is verified; empty before.
        guest: guest facts from that statement.
        models: what a channel statement says is served.
        runtime_events: what extended RTMR3, in order, from an event log that replays to all four
            registers; ``None`` when there was no log.
        event_claims: that log as Trustee's ``uefi_event_logs``; ``None`` without one, or when it
            is too long to be carried.
    """

    tdx: TdxFacts
    devices: tuple[DeviceFacts, ...]
    gpu_digest: str
    simulated: bool
    launch_digest: str = ""
    guest: Mapping[str, str] = field(default_factory=dict)
    models: tuple[ServedModel, ...] = ()
    runtime_events: tuple[str, ...] | None = None
    event_claims: tuple[Mapping[str, object], ...] | None = None

    def with_statement(self, statement: ReleaseStatement | ChannelStatement) -> Facts:
        """These facts with what a statement adds.

        Call it only when the report data or digest that binds ``statement`` has been verified.
        """
        models = statement.models if isinstance(statement, ChannelStatement) else ()
        return replace(
            self,
            launch_digest=statement.launch_digest,
            guest=dict(statement.guest_facts),
            models=models,
        )

    def to_json(self) -> dict[str, object]:
        """The facts as JSON; ``from_json`` is the inverse."""
        return {
            "tdx": _members(self.tdx),
            "devices": [_members(device) for device in self.devices],
            "gpu_digest": self.gpu_digest,
            "simulated": self.simulated,
            "launch_digest": self.launch_digest,
            "guest": dict(self.guest),
            "models": [model.to_json() for model in self.models],
            "runtime_events": _listed(self.runtime_events),
            "event_claims": _listed(self.event_claims),
        }

    @classmethod
    def from_json(cls, value: Any) -> Facts:
        """Parse ``to_json``'s form strictly.

        Raises:
            FormatError: a member is missing, unknown or of another form.
        """
        try:
            return _facts(Section(value, where="facts"))
        except SettingError as error:
            raise FormatError(error.message) from error

    def claims(self) -> list[tuple[str, dict[str, object]]]:
        """The evidence of each submodule as EAR and Rego see it, under Trustee's member names.

        Returns:
            ``cpu0`` first, then ``gpu0`` and so on. ``cpu0`` also has a member ``cai`` with what
            only our own statement says.
        """
        tdx = self.tdx.claims()
        if self.event_claims is not None:
            tdx["uefi_event_logs"] = list(self.event_claims)
        cpu: dict[str, object] = {
            "tdx": tdx,
            "report_data": self.tdx.body["report_data"],
            "init_data": self.tdx.body["mr_config_id"],
            "cai": {
                "simulated": self.simulated,
                "launch_digest": self.launch_digest,
                "guest": dict(self.guest),
                "gpu_digest": self.gpu_digest,
                "gpu_count": sum(not device.is_switch for device in self.devices),
                "models": [model.to_json() for model in self.models],
                "runtime_events": _listed(self.runtime_events),
            },
        }
        devices: list[tuple[str, dict[str, object]]] = [
            (f"gpu{place}", {"nvidia": device.claims()})
            for place, device in enumerate(self.devices)
        ]
        return [(CPU, cpu), *devices]


def _listed(items: tuple[Any, ...] | None) -> list[Any] | None:
    return None if items is None else list(items)


def _members(part: TdxFacts | DeviceFacts) -> dict[str, Any]:
    """The members as JSON; they hold texts one level deep, so ``asdict`` would copy for nothing."""
    members = {item.name: getattr(part, item.name) for item in fields(part)}
    return {
        name: list(item) if isinstance(item, tuple) else dict(item) if isinstance(item, Mapping)
        else item
        for name, item in members.items()
    }  # fmt: skip


def _facts(section: Section) -> Facts:
    tdx = section.section("tdx")
    if tdx is None:
        raise FormatError("facts: tdx is missing")
    facts = Facts(
        tdx=TdxFacts.parse(tdx),
        devices=tuple(_device(item) for item in _list(section, "devices")),
        gpu_digest=section.text("gpu_digest"),
        simulated=section.flag("simulated"),
        launch_digest=section.text("launch_digest"),
        guest=texts_by_name(section, "guest"),
        models=tuple(_model(item) for item in _list(section, "models")),
        runtime_events=(
            tuple(section.texts("runtime_events")) if section.has("runtime_events") else None
        ),
        event_claims=_events(section),
    )
    section.finish()
    return facts


def _events(section: Section) -> tuple[dict[str, object], ...] | None:
    if not section.has("event_claims"):
        return None
    events = _list(section, "event_claims")
    if not all(isinstance(item, dict) and set(item) == EVENT_MEMBERS for item in events):
        raise FormatError(f"{section.where}: event_claims must be a list of events")
    return tuple(events)


def _device(value: Any) -> DeviceFacts:
    section = Section(value, where="facts.devices")
    facts = DeviceFacts(
        arch=section.text("arch"),
        hwmodel=section.text("hwmodel"),
        ueid=section.text("ueid"),
        driver_version=section.text("driver_version"),
        vbios_version=section.text("vbios_version"),
        fwid=section.text("fwid"),
        measurements=texts_by_name(section, "measurements"),
        mode=section.text("mode"),
        rims=texts_by_name(section, "rims"),
        rim_expires=section.text("rim_expires"),
        ocsp_produced=section.text("ocsp_produced"),
    )
    section.finish()
    return facts


def _model(value: Any) -> ServedModel:
    section = Section(value, where="facts.models")
    model = ServedModel(
        root=section.text("root"),
        content_root=section.text("content_root"),
        allow=tuple(section.texts("allow")),
    )
    section.finish()
    return model


def _list(section: Section, name: str) -> list[Any]:
    value = section.raw(name)
    if not isinstance(value, list):
        raise FormatError(f"{section.where}: {name} must be a list")
    return value
