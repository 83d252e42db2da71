"""Reference values to review and sign: a guest or a set of measurements as policy texts.

Two texts come out: ``policy.toml`` (layer 2) that accepts exactly these values, and a Rego release
policy (layer 3) that asks for them again under Trustee's claim names. Whoever uses them reads them
first: they name whatever they were made from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cai import jcs
from cai.attest.facts import Facts
from cai.attest.policy_tables import Profile
from cai.attest.policy_tdx import (
    ALL_MEASUREMENTS,
    DEFAULTED_MEASUREMENTS,
    LAUNCH_READY,
    REQUIRED_MEASUREMENTS,
)
from cai.attest.policy_values import choices, hexes, texts
from cai.errors import FormatError, SettingError
from cai.settings import MAX_SETTINGS_FILE, Section

VERSION = 1
"""Version of the policy format that is written."""


@dataclass(frozen=True, slots=True)
class Measurements:
    """What a policy is to accept.

    Attributes:
        profile: guest profile.
        launch_digest: accepted digests of ``launch.json``.
        values: accepted values of each member of ``[tdx]`` that is compared.
        rtmr3_events: judge RTMR3 by the launch and ready events and not by its value.
        gpu_count: number of GPUs, switches not counted.
        architectures: accepted ones; empty for the default.
        driver_versions: accepted ones; empty is not asked.
        vbios_versions: accepted ones; empty is not asked.
        without_rim: measurements of the devices were not compared with reference values.
        without_ocsp: revocation of their certificates was not asked.
    """

    profile: str
    launch_digest: tuple[str, ...]
    values: Mapping[str, tuple[str, ...]]
    rtmr3_events: bool = False
    gpu_count: int = 0
    architectures: tuple[str, ...] = ()
    driver_versions: tuple[str, ...] = ()
    vbios_versions: tuple[str, ...] = ()
    without_rim: bool = False
    without_ocsp: bool = False


def gpu_count(facts: Facts) -> int:
    """Number of verified GPUs; a protected-PCIe system's switches are not among them."""
    return sum(1 for device in facts.devices if not device.is_switch)


def measurements_of(
    facts: Facts, *, profile: str | None = None, launch_digest: str | None = None
) -> Measurements:
    """The measurements of a guest whose evidence was verified.

    Args:
        facts: of the guest.
        profile: the guest profile; by default the one that the guest states.
        launch_digest: by default the one that the guest states.

    Raises:
        SettingError: the facts hold no profile or launch digest and none is given.
    """
    stated = profile or facts.guest.get("profile", "")
    if stated not in list(Profile):
        raise SettingError(
            f"no guest profile to write into a policy: {stated!r}",
            hint="give the profile: sealed or operated",
        )
    digest = launch_digest or facts.launch_digest
    if not digest:
        raise SettingError("no launch digest to write into a policy", hint="give the launch digest")
    gpus = [device for device in facts.devices if not device.is_switch]
    body = facts.tdx.body
    return Measurements(
        profile=stated,
        launch_digest=(digest,),
        values={name: (body[member],) for name, (member, _) in ALL_MEASUREMENTS.items()},
        gpu_count=len(gpus),
        architectures=tuple(device.arch for device in gpus),
        driver_versions=tuple(device.driver_version for device in gpus),
        vbios_versions=tuple(device.vbios_version for device in facts.devices),
        without_rim=any(not device.rims for device in facts.devices),
        without_ocsp=any(not device.ocsp_produced for device in facts.devices),
    )


def parse_measurements(data: bytes, *, where: str) -> Measurements:
    """Read measurements that a build wrote, as JSON (docs/spec-policy.md §4).

    Members are those of ``[tdx]`` that name values, as lists of hex; ``profile`` and
    ``launch_digest``; ``rtmr3_events: true`` in place of ``rtmr3``; and ``gpu`` with ``count``,
    ``architectures``, ``driver_versions``, ``vbios_versions``.

    Raises:
        LimitExceeded, FormatError: it is not JSON.
        SettingError: a member is missing, unknown or of another form.
    """
    value = jcs.parse(data, what=where, limit=MAX_SETTINGS_FILE)
    if not isinstance(value, dict):
        raise FormatError(f"{where}: not a JSON object")
    section = Section(value, where=where)
    events = section.flag("rtmr3_events", default=False)
    values: dict[str, tuple[str, ...]] = {}
    for name, (_, size) in REQUIRED_MEASUREMENTS.items():
        if not (events and name == "rtmr3"):
            values[name] = hexes(section, name, size)
    for name, (_, size, default) in DEFAULTED_MEASUREMENTS.items():
        values[name] = hexes(section, name, size) if section.has(name) else (default,)
    gpu = section.section("gpu") or Section({"count": 0}, where=where)
    found = Measurements(
        profile=_profile(section),
        launch_digest=hexes(section, "launch_digest", 48),
        values=values,
        rtmr3_events=events,
        gpu_count=gpu.integer("count", least=0, most=16, unit="GPUs"),
        architectures=choices(gpu, "architectures", ("HOPPER", "BLACKWELL"), []),
        driver_versions=texts(gpu, "driver_versions", []),
        vbios_versions=texts(gpu, "vbios_versions", []),
    )
    gpu.finish()
    section.finish()
    return found


def policy_text(measurements: Measurements) -> str:
    """The text of a ``policy.toml`` that accepts exactly these measurements.

    Raises:
        SettingError: a value is none that a policy can name.
    """
    tdx = {name: measurements.values[name] for name in ALL_MEASUREMENTS
           if not (name == "rtmr3" and measurements.rtmr3_events)}  # fmt: skip
    lines = [
        "# Accepts exactly the guest whose measurements it was written from.",
        f"version = {VERSION}",
        f"profile = {_quoted(measurements.profile)}",
        "",
        "[tdx]",
        *(f"{name} = {_array(values)}" for name, values in tdx.items()),
        *([f"rtmr3_events = {_quoted(LAUNCH_READY)}"] if measurements.rtmr3_events else []),
        f"tcb_status = [{_quoted('UpToDate')}]",
        "",
        "[gpu]",
        f"count = {measurements.gpu_count}",
        f"architectures = {_array(measurements.architectures)}",
        f"driver_versions = {_array(measurements.driver_versions)}",
        f"vbios_versions = {_array(measurements.vbios_versions)}",
        *(["unsafe_without_rim = true"] if measurements.without_rim else []),
        *(["unsafe_without_ocsp = true"] if measurements.without_ocsp else []),
        "",
        "[guest]",
        f"launch_digest = {_array(measurements.launch_digest)}",
        "",
    ]
    return "\n".join(lines)


def release_rego(measurements: Measurements, *, resource: str | None = None) -> str:
    """A Rego release policy (layer 3) over Trustee's claim names.

    Args:
        measurements: what it asks for.
        resource: ``repository/type/tag`` that alone is released; any of them without it.

    Raises:
        SettingError: a value is none that a policy can name.
    """
    evidence = '["ear.veraison.annotated-evidence"]'
    wanted = []
    for name, (member, _) in ALL_MEASUREMENTS.items():
        if name in measurements.values and not (name == "rtmr3" and measurements.rtmr3_events):
            values = ", ".join(_quoted(value) for value in sorted(set(measurements.values[name])))
            wanted.append(f"    tdx.quote.body.{member} in {{{values}}}")
    launch = ", ".join(_quoted(value) for value in sorted(set(measurements.launch_digest)))
    lines = [
        "# Asks again, in Trustee's claims, for what policy.toml of the same guest demands.",
        "package policy",
        "",
        "import rego.v1",
        "",
        "default allow := false",
        "",
        f"cpu := input.submods.cpu0{evidence}",
        "",
        "tdx := cpu.tdx",
        "",
        "allow if {",
        '    data.plugin == "resource"',
        *([f'    data["resource-path"] == {_path(resource)}'] if resource else []),
        '    input.submods.cpu0["ear.status"] == "affirming"',
        "    tdx.td_attributes.debug == false",
        '    tdx.tcb_status == "UpToDate"',
        *wanted,
        f"    cpu.cai.launch_digest in {{{launch}}}",
        f"    cpu.cai.gpu_count == {measurements.gpu_count}",
        *(f'    input.submods.gpu{place}["ear.status"] == "affirming"'
          for place in range(measurements.gpu_count)),
        "}",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _profile(section: Section) -> str:
    text = section.text("profile")
    if text not in list(Profile):
        raise SettingError(f"{section.where}: profile {text!r} is unknown",
                           hint="known are: sealed, operated")  # fmt: skip
    return text


def _path(resource: str) -> str:
    parts = resource.split("/")
    if len(parts) != 3 or not all(parts):
        raise SettingError(f"{resource!r} is not repository/type/tag")
    return "[" + ", ".join(_quoted(part) for part in parts) + "]"


def _quoted(text: str) -> str:
    """A TOML and Rego string; all values here are hex, versions or known words."""
    if not text.isascii() or any(char in '"\\' or not char.isprintable() for char in text):
        raise SettingError(f"no policy can name {text[:100]!r}")
    return f'"{text}"'


def _array(values: Iterable[str]) -> str:
    return "[" + ", ".join(_quoted(value) for value in sorted(set(values))) + "]"
