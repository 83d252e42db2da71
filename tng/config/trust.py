"""Who proves what to whom: ``no_ra``, ``attest`` and ``verify`` of an entry."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cai.attest.channel import Expectation
from cai.errors import SettingError
from cai.settings import Section, suggestion
from tng.config.notes import NoteKind, Notes

REFRESH_S = 600
"""How old stock evidence may grow before it is made anew, seconds (TNG's default)."""

MAX_REFRESH_S = 2**63
"""Largest ``refresh_interval`` that is read, seconds."""

PRESETS = (
    "hardware_only", "hardware_only_strict", "hardware_with_reference_values",
    "hardware_strict_with_reference_values", "hardware_strict_with_measurements", "trust_all",
    "transparency_log", "inline", "path",
)  # fmt: skip
"""``attestation_policy`` types of TNG's own built-in verification."""


class Model(StrEnum):
    """Who takes the evidence to the attestation service."""

    BACKGROUND_CHECK = "background_check"
    PASSPORT = "passport"


class Binding(StrEnum):
    """What a peer's evidence must be bound to (decisions §4, Downgrade)."""

    SESSION = "session"
    AUTO = "auto"
    KEY = "key"


@dataclass(frozen=True, slots=True)
class Service:
    """An attestation service as somebody who converts evidence calls it.

    Attributes:
        address: base URL, ends in ``/``.
        policy_ids: policies that it shall apply.
        headers: for each of its requests.
    """

    address: str
    policy_ids: tuple[str, ...] = ()
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class BuiltinVerify:
    """Verification in this process (``as_type: builtin``).

    Attributes:
        policy: verification policy file (layer 2).
        collateral: TDX collateral; ``None`` has none.
        simulated_root: directory of ``unsafe_simulated_root``.
        expect: what this end pins beyond the policy.
        rims: directory of NVIDIA's reference measurements; ``None`` does not compare.
        ocsp: directory of NVIDIA's revocation answers; ``None`` does not ask.
        binding: what evidence must be bound to.
        kbs_key: Ed25519 key, hex, whose admission ticket a peer must staple; empty asks for none.
    """

    policy: Path
    collateral: Path | None
    simulated_root: Path | None
    expect: Expectation
    rims: Path | None = None
    ocsp: Path | None = None
    binding: Binding = Binding.SESSION
    kbs_key: str = ""


@dataclass(frozen=True, slots=True)
class ServiceVerify:
    """Verification by an attestation service (stock syntax).

    Attributes:
        as_addr: base URL, ends in ``/``; empty in the passport model without one.
        policy_ids: policies whose appraisal a token must name.
        as_headers: headers for each of its requests.
        model: who takes the evidence there.
        trusted_certs: PEM roots of its tokens; ``None`` fetches them.
        skip_certificate: take any signer (``skip_as_token_cert_verify``).
        trust_fetched: take a certificate that was fetched without authentication.
        binding: what evidence must be bound to.
        expect: what this end pins beyond the appraisal.
        kbs_key: Ed25519 key, hex, whose admission ticket a peer must staple; empty asks for none.
    """

    as_addr: str
    policy_ids: tuple[str, ...]
    as_headers: tuple[tuple[str, str], ...]
    model: Model = Model.BACKGROUND_CHECK
    trusted_certs: tuple[Path, ...] | None = None
    skip_certificate: bool = False
    trust_fetched: bool = False
    binding: Binding = Binding.AUTO
    expect: Expectation = field(default_factory=Expectation)
    kbs_key: str = ""

    @property
    def unsafe(self) -> tuple[str, ...]:
        """What weakens it, by the names that logs and verdicts show."""
        skip = ("unsafe_skip_as_token_cert_verify",) if self.skip_certificate else ()
        fetched = ("unsafe_trust_fetched_as_certificate",) if self.trust_fetched else ()
        return (*skip, *fetched)


Verify = BuiltinVerify | ServiceVerify


@dataclass(frozen=True, slots=True)
class Attest:
    """How this end proves itself.

    Attributes:
        socket: of the attestation agent: its channel socket, or a stock agent's.
        model: who takes the evidence to the attestation service.
        refresh_s: how old stock evidence may grow, seconds; 0 makes it for each handshake.
        service: where this end takes it, in the passport model.
    """

    socket: Path
    model: Model = Model.BACKGROUND_CHECK
    refresh_s: int = REFRESH_S
    service: Service | None = None


@dataclass(frozen=True, slots=True)
class Trust:
    """Who proves what to whom.

    Attributes:
        attest: how this end proves itself; ``None`` when it does not.
        verify: how it checks the peer; ``None`` when it does not.
    """

    attest: Attest | None = None
    verify: Verify | None = None

    @property
    def unsafe(self) -> tuple[str, ...]:
        """What weakens it, by the names that logs and verdicts show."""
        found = []
        if self.attest is None and self.verify is None:
            found.append("unsafe_no_ra")
        if isinstance(self.verify, ServiceVerify):
            found += self.verify.unsafe
        return tuple(found)


def parse_trust(entry: Section, notes: Notes) -> Trust:
    """``no_ra``, ``attest`` and ``verify`` of one entry.

    Raises:
        SettingError: none of them, ``no_ra`` beside another, or something of another shape.
    """
    no_ra = entry.flag("no_ra", default=False)
    attest_section, verify_section = entry.section("attest"), entry.section("verify")
    if no_ra and (attest_section or verify_section):
        raise SettingError(f"{entry.where}: no_ra excludes attest and verify")
    attest = None
    if attest_section is not None:
        # TNG's documents write no_ra here; its parser refuses that.
        if attest_section.flag("no_ra", default=False):
            no_ra = verify_section is None
            attest_section.finish()
        else:
            attest = _attest(attest_section, notes)
    verify = _verify(verify_section, notes) if verify_section is not None else None
    trust = Trust(attest, verify)
    if not no_ra and attest is None and verify is None and attest_section is None:
        raise SettingError(
            f"{entry.where}: nobody proves anything",
            hint="give verify (check the peer) or attest (prove this end)",
        )
    if no_ra:
        notes.add(
            NoteKind.CLEAR, entry.where, "no_ra: encrypted to nobody in particular, unattested"
        )
    return trust


def _attest(section: Section, notes: Notes) -> Attest:
    model = _choice(section, "model", Model, Model.BACKGROUND_CHECK)
    provider = section.text("aa_provider", "coco")
    kind = section.text("aa_type", "uds")
    if provider not in ("coco", "ita", "coco_asr", "ita_asr"):
        raise SettingError(
            f"{section.where}: aa_provider is {provider!r}",
            hint=suggestion(provider, ("coco", "ita", "coco_asr", "ita_asr")),
        )
    if provider == "coco" and kind not in ("uds", "builtin"):
        raise SettingError(f"{section.where}: aa_type is {kind!r}, expected 'uds'")
    if provider != "coco":
        notes.refuse(section.where, f"aa_provider {provider}", "give aa_addr of an agent")
    if kind == "builtin":
        raise SettingError(
            f"{section.where}: aa_type 'builtin' is not done by any version",
            hint='give {"aa_addr": "unix:///path/to/agent.sock"}',
        )
    refresh = section.integer(
        "refresh_interval", REFRESH_S, least=0, most=MAX_REFRESH_S, unit="seconds"
    )
    if provider.endswith("_asr"):
        section.text("asr_addr")
        socket = Path()
    else:
        socket = _socket(section)
    service = _service(section) if model is Model.PASSPORT else None
    notes.ignore_unknown(section)
    return Attest(socket, model, refresh, service)


def _socket(section: Section) -> Path:
    address = section.text("aa_addr")
    if not address.startswith("unix:///"):
        raise SettingError(
            f"{section.where}: aa_addr is {address!r}", hint="it starts with unix:///"
        )
    return Path(address.removeprefix("unix://"))


def _service(section: Section) -> Service:
    address = _base(section, section.text("as_addr"))
    return Service(address, tuple(section.texts("policy_ids", [])), _headers(section))


def _verify(section: Section, notes: Notes) -> Verify:
    model = _choice(section, "model", Model, Model.BACKGROUND_CHECK)
    provider = section.text("as_provider", "coco")
    if provider == "ita":
        for name in ("as_addr", "api_key", "ita_jwks_addr"):
            section.text(name, "")
        section.texts("policy_ids", [])
        notes.refuse(section.where, "as_provider ita", "give as_type builtin or a Trustee service")
        notes.ignore_unknown(section)
        return ServiceVerify("", (), ())
    if provider != "coco":
        raise SettingError(
            f"{section.where}: as_provider is {provider!r}", hint="expected 'coco' or 'ita'"
        )
    kind = section.text("as_type", "restful")
    if kind == "builtin":
        return _builtin(section, notes, model)
    if kind == "grpc" or section.flag("as_is_grpc", default=False):
        raise SettingError(
            f"{section.where}: an attestation service over gRPC is not done by any version",
            hint="give the address of its REST interface and as_type: restful",
        )
    if kind != "restful":
        raise SettingError(
            f"{section.where}: as_type is {kind!r}, expected 'builtin' or 'restful'",
            hint=suggestion(kind, ("builtin", "restful", "grpc")),
        )
    return _service_verify(section, notes, model)


def _builtin(section: Section, notes: Notes, model: Model) -> BuiltinVerify:
    if model is Model.PASSPORT:
        raise SettingError(f"{section.where}: a passport is checked by its service, not built in")
    _preset(section, notes)
    policy = section.text("policy", "")
    if not policy:
        notes.refuse(
            section.where,
            "verification without a policy file",
            "give policy: FILE (`cai attest reference` writes one from a guest's own evidence)",
        )
    result = BuiltinVerify(
        policy=Path(policy),
        collateral=_path(section, "collateral"),
        simulated_root=_path(section, "unsafe_simulated_root"),
        expect=_expectation(section),
        rims=_path(section, "rims"),
        ocsp=_path(section, "ocsp"),
        binding=_choice(section, "binding", Binding, Binding.SESSION),
        kbs_key=_hex(section, "kbs_key", 32),
    )
    # Ours, so that unknown keys are errors; TNG's own names are known and told about above.
    section.finish()
    return result


def _preset(section: Section, notes: Notes) -> None:
    """TNG's own policies for built-in verification, read to tell them apart from typos."""
    preset = section.section("attestation_policy")
    if preset is not None:
        kind = preset.text("type")
        if kind not in (*PRESETS, "default"):
            raise SettingError(
                f"{preset.where}: type is {kind!r}", hint=suggestion(kind, PRESETS)
            )
        needs = {
            "inline": "content", "path": "path", "transparency_log": "services",
            "hardware_strict_with_measurements": "measurements",
        }.get(kind)  # fmt: skip
        if needs is not None and not preset.has(needs):
            raise SettingError(f"{preset.where}: {needs} is missing")
        if needs in ("services", "measurements") and not isinstance(preset.raw(needs), list):
            raise SettingError(f"{preset.where}: {needs} must be a list")
        if kind == "hardware_strict_with_measurements" and not preset.texts("measurements"):
            raise SettingError(f"{preset.where}: measurements must not be empty")
        if kind == "transparency_log":
            for index, service in enumerate(preset.raw("services")):
                Section(service, where=f"{preset.where}.services[{index}]").text("type")
        notes.ignore_unknown(preset)
        notes.refuse(preset.where, f"attestation_policy {kind}", "write it as policy: FILE")
    values = section.raw("reference_values")
    if values is not None:
        if not isinstance(values, list):
            raise SettingError(f"{section.where}: reference_values must be a list")
        for index, value in enumerate(values):
            _reference_value(Section(value, where=f"{section.where}.reference_values[{index}]"))
        notes.refuse(section.where, "reference_values", "write them into policy: FILE")


def _reference_value(value: Section) -> None:
    kind = value.text("type")
    if kind not in ("sample", "slsa", "release_manifest"):
        raise SettingError(f"{value.where}: type is {kind!r}")
    payload = value.section("payload")
    if payload is None:
        raise SettingError(f"{value.where}: payload is missing")
    source = payload.text("type")
    if source == "path":
        payload.text("path")
    elif source != "inline" or not payload.has("content"):
        raise SettingError(f"{payload.where}: expected inline content or a path")
    elif kind == "slsa":
        content = Section(payload.raw("content"), where=f"{payload.where}.content")
        if not content.has("rv_list"):
            raise SettingError(f"{content.where}: rv_list is missing")


def _service_verify(section: Section, notes: Notes, model: Model) -> ServiceVerify:
    address = section.text("as_addr", "")
    skip = section.flag("skip_as_token_cert_verify", default=False)
    trusted = section.raw("trusted_certs_paths")
    certificates = tuple(map(Path, section.texts("trusted_certs_paths", [])))
    headers = _headers(section)
    if model is Model.BACKGROUND_CHECK and not address:
        raise SettingError(f"{section.where}: as_addr is missing")
    if headers and not address:
        raise SettingError(f"{section.where}: as_headers need as_addr")
    if not address and trusted is None and not skip:
        raise SettingError(f"{section.where}: give as_addr or trusted_certs_paths")
    if skip and trusted is not None:
        raise SettingError(
            f"{section.where}: skip_as_token_cert_verify and trusted_certs_paths exclude each other"
        )
    if skip and address and model is Model.PASSPORT:
        raise SettingError(f"{section.where}: as_addr has no use beside skip_as_token_cert_verify")
    if not section.has("policy_ids"):
        raise SettingError(
            f"{section.where}: policy_ids is missing",
            hint='give ["default"], or [] for any policy',
        )
    if section.flag("verify_signer_transparency", default=False):
        notes.refuse(section.where, "verify_signer_transparency")
    if skip:
        notes.add(NoteKind.CLEAR, section.where, "a token is taken from any signer")
    result = ServiceVerify(
        as_addr=_base(section, address) if address else "",
        policy_ids=tuple(section.texts("policy_ids")),
        as_headers=headers,
        model=model,
        trusted_certs=None if trusted is None else certificates,
        skip_certificate=skip,
        trust_fetched=section.flag("unsafe_trust_fetched_as_certificate", default=False),
        binding=_choice(section, "binding", Binding, Binding.AUTO),
        expect=_expectation(section),
        kbs_key=_hex(section, "kbs_key", 32),
    )
    section.raw("as_is_grpc")
    notes.ignore_unknown(section)
    return result


def _expectation(section: Section) -> Expectation:
    expect = section.section("expect")
    if expect is None:
        return Expectation()
    sizes = {"launch": 48, "owner": 32, "model_root": 32, "content_root": 32}
    values = {name: _hex(expect, name, size) for name, size in sizes.items()}
    values["service"] = expect.text("service", "")
    if expect.has("service") and not values["service"]:
        raise SettingError(f"{expect.where}: service must not be empty")
    expect.finish()
    return Expectation(**values)


def _hex(section: Section, name: str, size: int) -> str:
    value = section.text(name, "")
    # An empty value would read as "not asked": whoever names a member asks for it.
    if section.has(name) and (len(value) != 2 * size or not set(value) <= set("0123456789abcdef")):
        raise SettingError(f"{section.where}: {name} must be {2 * size} lower-case hex digits")
    return value


def _headers(section: Section) -> tuple[tuple[str, str], ...]:
    headers = section.raw("as_headers") or {}
    if not isinstance(headers, dict) or not all(isinstance(v, str) for v in headers.values()):
        raise SettingError(f"{section.where}: as_headers must map names to strings")
    return tuple(sorted(headers.items()))


def _path(section: Section, name: str) -> Path | None:
    return Path(section.text(name)) if section.has(name) else None


def _choice(section: Section, name: str, kind: type[Any], default: Any) -> Any:
    value = section.text(name, default.value)
    try:
        return kind(value)
    except ValueError as error:
        known = [item.value for item in kind]
        raise SettingError(
            f"{section.where}: {name} is {value!r}, expected one of: {', '.join(known)}",
            hint=suggestion(value, known),
        ) from error


def _base(section: Section, address: str) -> str:
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        usable = usable and not (parts.query or parts.fragment or parts.username)
    except ValueError:
        usable = False
    if not usable or not address.isprintable() or " " in address:
        raise SettingError(f"{section.where}: as_addr {address!r} is not an http or https URL")
    return address if address.endswith("/") else address + "/"
