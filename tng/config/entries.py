"""The configuration of `tng launch`: the supported part of TNG's schema, read strictly.

The grammar is that of TNG (one mode key an entry, common keys beside it). What this version does
not do is refused by name instead of being ignored; what stock TNG ignores silently is refused or
warned about. The data classes are what the rest of the package works with.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cai.attest.channel import Expectation
from cai.errors import SettingError
from cai.settings import Section, read_settings_file, suggestion
from tng.config.addresses import Endpoint, TcpUpstream, Upstream, parse_endpoint, parse_rules
from tng.config.documents import parse_json, parse_yaml
from tng.config.filters import Filter, parse_filters

MAX_ENTRIES = 64
"""Most entries of one kind."""

_LATER_MODES = {
    "ingress": ("socks5", "netfilter", "hook", "mapping_udp", "netfilter_udp"),
    "egress": ("netfilter", "hook", "mapping_udp", "netfilter_udp"),
}
_MODES = {"ingress": ("http_proxy", "mapping"), "egress": ("mapping",)}
_LATER_KEYS = (
    "no_ra", "ohttp", "encap_in_http", "decap_from_http", "rats_tls", "quic", "direct_forward",
    "web_page_inject",
)  # fmt: skip
_LATER_TOP = ("metric", "metrics", "trace", "admin_bind")
_LATER_VERIFY = (
    "trusted_certs_paths", "verify_signer_transparency", "skip_as_token_cert_verify",
    "attestation_policy", "reference_values", "as_is_grpc", "api_key", "ita_jwks_addr",
)  # fmt: skip

NOT_YET = "not in this version"
"""What every refusal of a known but unsupported setting says."""


@dataclass(frozen=True, slots=True)
class BuiltinVerify:
    """Verification in this process (``as_type: builtin``).

    Attributes:
        policy: verification policy file (layer 2).
        collateral: TDX collateral; ``None`` has none.
        rims: directory of NVIDIA's reference measurements; ``None`` does not compare.
        ocsp: directory of NVIDIA's revocation answers; ``None`` does not ask.
        simulated_root: directory of ``unsafe_simulated_root``.
        expect: what this client pins beyond the policy.
    """

    policy: Path
    collateral: Path | None
    simulated_root: Path | None
    expect: Expectation
    rims: Path | None = None
    ocsp: Path | None = None


@dataclass(frozen=True, slots=True)
class ServiceVerify:
    """Verification by an attestation service (stock syntax).

    Attributes:
        as_addr: base URL, ends in ``/``.
        policy_ids: policies that the service shall apply.
        as_headers: headers for each of its requests.
    """

    as_addr: str
    policy_ids: tuple[str, ...]
    as_headers: tuple[tuple[str, str], ...]


Verify = BuiltinVerify | ServiceVerify


@dataclass(frozen=True, slots=True)
class Attest:
    """How an egress proves itself: the agent's channel socket."""

    socket: Path


@dataclass(frozen=True, slots=True)
class HttpProxyIngress:
    """An HTTP proxy for clients of this machine."""

    name: str
    listen: Endpoint
    filters: tuple[Filter, ...]
    verify: Verify
    padding: bool


@dataclass(frozen=True, slots=True)
class MappingIngress:
    """Ports of this machine that lead to fixed attested peers."""

    name: str
    rules: tuple[tuple[Endpoint, TcpUpstream], ...]
    verify: Verify
    padding: bool


@dataclass(frozen=True, slots=True)
class EgressMapping:
    """Attested ports that lead to upstreams of this guest."""

    name: str
    rules: tuple[tuple[Endpoint, Upstream], ...]
    attest: Attest
    padding: bool
    unsafe: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Config:
    """Everything one `tng launch` does.

    Attributes:
        ingress: entries of ``add_ingress``.
        egress: entries of ``add_egress``.
        control: address of the control interface.
        warnings: what was accepted but has no effect.
    """

    ingress: tuple[HttpProxyIngress | MappingIngress, ...]
    egress: tuple[EgressMapping, ...]
    control: Endpoint | None
    warnings: tuple[str, ...]


def load_content(text: str) -> Config:
    """The configuration given on the command line, as JSON.

    Raises:
        SettingError, LimitExceeded: it is not a configuration of this version.
    """
    data = text.encode("utf-8", "surrogatepass")
    return parse(parse_json(data, "--config-content"), where="--config-content")


def load_file(path: Path) -> Config:
    """The configuration of a file: YAML by its suffix (``.yaml``, ``.yml``), else JSON.

    Raises:
        InputMissing, StorageError: it cannot be read.
        SettingError, LimitExceeded: it is not a configuration of this version.
    """
    data = read_settings_file(path, what="configuration")
    yaml_file = path.suffix.lower() in (".yaml", ".yml")
    value = parse_yaml(data, str(path)) if yaml_file else parse_json(data, str(path))
    return parse(value, where=path.name)


def parse(value: Any, *, where: str) -> Config:
    """Read a parsed configuration strictly.

    Raises:
        SettingError: anything is unknown, missing, out of range, or not in this version.
    """
    if not isinstance(value, dict):
        raise SettingError(f"{where}: expected an object with add_ingress or add_egress")
    top = Section(value, where=where)
    _refuse_later(top, _LATER_TOP)
    warnings: list[str] = []
    ingress = tuple(
        _ingress(Section(entry, where=f"{where} add_ingress[{index}]"), index)
        for index, entry in enumerate(_entries(value, "add_ingress", where))
    )
    egress = tuple(
        _egress(Section(entry, where=f"{where} add_egress[{index}]"), index, warnings)
        for index, entry in enumerate(_entries(value, "add_egress", where))
    )
    control = _control(top.section("control_interface"))
    top.finish(("add_ingress", "add_egress"))
    if not ingress and not egress:
        raise SettingError(
            f"{where}: nothing to do", hint="give at least one entry of add_ingress or add_egress"
        )
    return Config(ingress, egress, control, tuple(warnings))


def _ingress(entry: Section, index: int) -> HttpProxyIngress | MappingIngress:
    mode = _mode(entry, "ingress")
    if entry.has("attest"):
        raise SettingError(f"{entry.where}: attest (a client that proves itself) is {NOT_YET}")
    verify = _verify(entry)
    padding = _padding(entry)
    body = entry.section(mode)
    assert body is not None  # noqa: S101 - _mode has seen it
    entry.finish()
    name = f"ingress[{index}]"
    if mode == "mapping":
        rules = tuple((listen, _remote(target, body)) for listen, target in parse_rules(body))
        return MappingIngress(name, rules, verify, padding)
    listen_section = body.section("proxy_listen")
    if listen_section is None:
        raise SettingError(f"{body.where}: proxy_listen is missing", hint='give {"port": 41000}')
    # Stock TNG listens on every interface by default; an open proxy is never meant.
    listen = parse_endpoint(listen_section, default_host="127.0.0.1")
    if body.has("dst_filters") and body.has("dst_filter"):
        raise SettingError(f"{body.where}: dst_filters and dst_filter are the same setting")
    raw = body.raw("dst_filters") if body.has("dst_filters") else body.raw("dst_filter")
    filters = parse_filters(raw, where=f"{body.where}.dst_filters")
    body.finish()
    return HttpProxyIngress(name, listen, filters, verify, padding)


def _remote(target: Upstream, body: Section) -> TcpUpstream:
    if isinstance(target, TcpUpstream):
        return target
    raise SettingError(f"{body.where}: an ingress leads to a host and port, not to a Unix socket")


def _egress(entry: Section, index: int, warnings: list[str]) -> EgressMapping:
    mode = _mode(entry, "egress")
    if entry.has("verify"):
        raise SettingError(f"{entry.where}: verify (demanding proof of clients) is {NOT_YET}")
    attest = _attest(entry, warnings)
    padding = _padding(entry)
    remote = entry.flag("unsafe_remote_upstream", default=False)
    body = entry.section(mode)
    assert body is not None  # noqa: S101 - _mode has seen it
    entry.finish()
    rules = tuple(parse_rules(body))
    for _listen, upstream in rules:
        if isinstance(upstream, TcpUpstream) and not _is_loopback(upstream.host) and not remote:
            raise SettingError(
                f"{body.where}: upstream {upstream} is not of this guest: it would get the "
                "plain text over a network",
                hint="use loopback or a Unix socket, or say unsafe_remote_upstream: true",
            )
    unsafe = ("unsafe_remote_upstream",) if remote else ()
    return EgressMapping(f"egress[{index}]", rules, attest, padding, unsafe)


def _mode(entry: Section, kind: str) -> str:
    for later in _LATER_MODES[kind]:
        if entry.has(later):
            raise SettingError(
                f"{entry.where}: mode {later} is {NOT_YET}",
                hint=f"modes of this version: {', '.join(_MODES[kind])}",
            )
    _refuse_later(entry, _LATER_KEYS)
    found = [mode for mode in _MODES[kind] if entry.has(mode)]
    if len(found) != 1:
        raise SettingError(
            f"{entry.where}: {'more than one mode' if found else 'no mode'}",
            hint=f"give exactly one of: {', '.join(_MODES[kind])}",
        )
    return found[0]


def _refuse_later(section: Section, names: tuple[str, ...]) -> None:
    for name in names:
        value = section.raw(name)
        # An explicit "off" asks for nothing that this version would have to do.
        if value is not None and value is not False:
            raise SettingError(f"{section.where}: {name} is {NOT_YET}")


def _padding(entry: Section) -> bool:
    value = entry.text("padding", "bucket")
    if value not in ("bucket", "off"):
        raise SettingError(f"{entry.where}: padding is {value!r}, expected 'bucket' or 'off'")
    return value == "bucket"


def _verify(entry: Section) -> Verify:
    verify = entry.section("verify")
    if verify is None:
        raise SettingError(
            f"{entry.where}: verify is missing, and an ingress that checks nobody is {NOT_YET}",
            hint='give {"as_type": "builtin", "policy": FILE}',
        )
    for name, only in (("model", "background_check"), ("as_provider", "coco")):
        value = verify.text(name, only)
        if value != only:
            raise SettingError(f"{verify.where}: {name} {value!r} is {NOT_YET}")
    _refuse_later(verify, _LATER_VERIFY)
    kind = verify.text("as_type", "restful")
    binding = verify.text("binding", "session")
    if binding not in ("session", "auto"):
        raise SettingError(
            f"{verify.where}: binding {binding!r} is {NOT_YET}", hint="binding is 'session'"
        )
    if kind == "builtin":
        return _builtin(verify)
    if kind == "restful":
        return _service(verify)
    if kind == "grpc":
        raise SettingError(f"{verify.where}: as_type 'grpc' is {NOT_YET}")
    raise SettingError(
        f"{verify.where}: as_type is {kind!r}, expected 'builtin' or 'restful'",
        hint=suggestion(kind, ("builtin", "restful", "grpc")),
    )


def _builtin(verify: Section) -> BuiltinVerify:
    if not verify.has("policy"):
        raise SettingError(
            f"{verify.where}: policy is missing, and without one nothing is accepted",
            hint="give the verification policy file of the guest you expect",
        )
    expect = verify.section("expect")
    result = BuiltinVerify(
        policy=Path(verify.text("policy")),
        collateral=Path(verify.text("collateral")) if verify.has("collateral") else None,
        simulated_root=(
            Path(verify.text("unsafe_simulated_root"))
            if verify.has("unsafe_simulated_root")
            else None
        ),
        expect=_expectation(expect) if expect else Expectation(),
        rims=Path(verify.text("rims")) if verify.has("rims") else None,
        ocsp=Path(verify.text("ocsp")) if verify.has("ocsp") else None,
    )
    verify.finish()
    return result


def _expectation(expect: Section) -> Expectation:
    sizes = {"launch": 48, "owner": 32, "model_root": 32, "content_root": 32}
    values = {name: expect.text(name, "") for name in (*sizes, "service")}
    expect.finish()
    for name, size in sizes.items():
        # An empty value would read as "not asked": whoever names a member asks for it.
        value = values[name]
        if expect.has(name) and (
            len(value) != 2 * size or not set(value) <= set("0123456789abcdef")
        ):
            raise SettingError(
                f"{expect.where}: {name} must be {2 * size} lower-case hex digits"
            )
    if expect.has("service") and not values["service"]:
        raise SettingError(f"{expect.where}: service must not be empty")
    return Expectation(**values)


def _service(verify: Section) -> ServiceVerify:
    address = verify.text("as_addr")
    parts = _url(address)
    if parts is None:
        raise SettingError(f"{verify.where}: as_addr {address!r} is not an http or https URL")
    if not verify.has("policy_ids"):
        raise SettingError(
            f"{verify.where}: policy_ids is missing", hint='give ["default"], or [] for any policy'
        )
    policies = tuple(verify.texts("policy_ids"))
    headers = verify.raw("as_headers") or {}
    if not isinstance(headers, dict) or not all(isinstance(v, str) for v in headers.values()):
        raise SettingError(f"{verify.where}: as_headers must map names to strings")
    verify.finish()
    base = address if address.endswith("/") else address + "/"
    return ServiceVerify(base, policies, tuple(sorted(headers.items())))


def _attest(entry: Section, warnings: list[str]) -> Attest:
    attest = entry.section("attest")
    if attest is None:
        raise SettingError(
            f"{entry.where}: attest is missing, and an egress that proves nothing is {NOT_YET}",
            hint='give {"aa_addr": "unix:///path/to/channel.sock"}',
        )
    _refuse_later(attest, ("no_ra",))
    for name, only in (
        ("model", "background_check"), ("aa_provider", "coco"), ("aa_type", "uds"),
    ):  # fmt: skip
        value = attest.text(name, only)
        if value != only:
            raise SettingError(f"{attest.where}: {name} {value!r} is {NOT_YET}")
    if attest.has("refresh_interval"):
        warnings.append(
            f"{attest.where}: refresh_interval has no effect: every session is proven anew"
        )
    address = attest.text("aa_addr")
    if not address.startswith("unix:///"):
        raise SettingError(
            f"{attest.where}: aa_addr is {address!r}", hint="it starts with unix:///"
        )
    attest.finish()
    return Attest(Path(address.removeprefix("unix://")))


def _control(control: Section | None) -> Endpoint | None:
    if control is None:
        return None
    if control.has("ttrpc"):
        raise SettingError(f"{control.where}: ttrpc is {NOT_YET}", hint="use restful")
    restful = control.section("restful")
    control.finish()
    if restful is None:
        raise SettingError(f"{control.where}: restful is missing", hint='give {"port": 50000}')
    return parse_endpoint(restful, default_host="127.0.0.1")


def _entries(value: dict[str, Any], name: str, where: str) -> list[Any]:
    # Unlike elsewhere in the schema, a null is not an absent list.
    raw = value.get(name, [])
    if not isinstance(raw, list) or len(raw) > MAX_ENTRIES:
        raise SettingError(f"{where}: {name} must be a list of at most {MAX_ENTRIES} entries")
    return raw


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _url(text: str) -> Any:
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        return None
    plain = text.isprintable() and not parts.query and not parts.fragment and not parts.username
    return parts if usable and plain and " " not in text else None
