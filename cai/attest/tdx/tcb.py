"""How up to date a platform is: Intel's TCB level algorithm (docs/spec-evidence.md §3.3).

Pure functions over the signed texts of TCB information and QE identity, whose signatures somebody
else has verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cai.attest.tdx.signed_json import Members
from cai.errors import EvidenceRefused, FormatError

COMPONENTS = 16

UP_TO_DATE = "UpToDate"
OUT_OF_DATE = "OutOfDate"
REVOKED = "Revoked"
OUT_OF_DATE_CONFIGURATION = "OutOfDateConfigurationNeeded"

PLATFORM_STATUS = (
    UP_TO_DATE, "SWHardeningNeeded", "ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded",
    OUT_OF_DATE, OUT_OF_DATE_CONFIGURATION, REVOKED,
)  # fmt: skip
"""Statuses that a level of the platform may have."""

SVN_STATUS = (UP_TO_DATE, OUT_OF_DATE, REVOKED)
"""Statuses that a level of a module or quoting enclave may have."""

_BEHIND = (OUT_OF_DATE, OUT_OF_DATE_CONFIGURATION)

_WORSE = {
    UP_TO_DATE: OUT_OF_DATE,
    "SWHardeningNeeded": OUT_OF_DATE,
    "ConfigurationNeeded": OUT_OF_DATE_CONFIGURATION,
    "ConfigurationAndSWHardeningNeeded": OUT_OF_DATE_CONFIGURATION,
}
"""A platform's status when its module or quoting enclave is out of date."""


@dataclass(frozen=True, slots=True)
class Level:
    """One level of the platform.

    Attributes:
        sgx: least SVN of each SGX component.
        pce_svn: least SVN of the provisioning enclave.
        tdx: least SVN of each TDX component.
        status: of a platform that matches it.
        date: ``tcbDate``, RFC 3339.
        advisories: ids that apply.
    """

    sgx: tuple[int, ...]
    pce_svn: int
    tdx: tuple[int, ...]
    status: str
    date: str
    advisories: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SvnLevel:
    """One level of a TDX module or quoting enclave: least SVN, status, date, advisories."""

    svn: int
    status: str
    date: str
    advisories: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Module:
    """The identity of a TDX module: signer, attributes and their mask, levels newest first."""

    signer: bytes
    attributes: bytes
    mask: bytes
    levels: tuple[SvnLevel, ...]


@dataclass(frozen=True, slots=True)
class Platform:
    """What is measured against the levels.

    Attributes:
        components: the 16 SVNs of the PCK certificate.
        pce_svn: its PCE SVN.
        tee_tcb_svn: 16 bytes of the quote's body.
        tee_tcb_svn2: those that are loaded now, TD 1.5 bodies only.
        seam_signer: mrsigner_seam of the body.
        seam_attributes: of the body.
    """

    components: tuple[int, ...]
    pce_svn: int
    tee_tcb_svn: bytes
    tee_tcb_svn2: bytes | None
    seam_signer: bytes
    seam_attributes: bytes


@dataclass(frozen=True, slots=True)
class TcbResult:
    """Status of platform, module and quoting enclave together, and what goes with it."""

    status: str
    date: str
    advisories: tuple[str, ...]


def svn_levels(items: Sequence[Members]) -> tuple[SvnLevel, ...]:
    """Levels of a module or quoting enclave, in the order given (newest first)."""
    return tuple(
        SvnLevel(
            item.member("tcb").integer("isvsvn", 0xFFFF), item.word("tcbStatus", PLATFORM_STATUS),
            item.text("tcbDate"), item.texts("advisoryIDs"),
        )
        for item in items
    )


def platform_levels(info: Members) -> tuple[Level, ...]:
    """Levels of TCB information, newest first."""
    levels = []
    for item in info.objects("tcbLevels"):
        tcb = item.member("tcb")
        levels.append(
            Level(
                sgx=_components(tcb, "sgxtcbcomponents"),
                pce_svn=tcb.integer("pcesvn", 0xFFFF),
                tdx=_components(tcb, "tdxtcbcomponents"),
                status=item.word("tcbStatus", PLATFORM_STATUS),
                date=item.text("tcbDate"),
                advisories=item.texts("advisoryIDs"),
            )
        )
    return tuple(sorted(levels, key=lambda each: (each.sgx, each.pce_svn, each.tdx), reverse=True))


def evaluate(info: Members, platform: Platform, qe: SvnLevel) -> TcbResult:
    """Evaluate a platform (spec-evidence §3.3).

    Args:
        info: TCB information, signature verified.
        platform: what the quote and the PCK certificate say.
        qe: the quoting enclave's level.

    Raises:
        EvidenceRefused: no level or module identity fits, or something is revoked.
        FormatError: the information has another form.
    """
    levels = platform_levels(info)
    # (a) The levels that the SVNs of the processor reach, newest first.
    reached = [level for level in levels if _sgx_reaches(platform, level)]
    # (b) With the module that started this TD; the same for the one that is loaded now.
    matched, module = _with_module(info, platform, reached, platform.tee_tcb_svn)
    status = _converge(matched.status, module.status if module else UP_TO_DATE)
    # (c) With the module that is loaded now the platform would be current: only this TD, started
    # before the update, has to be started again.
    if platform.tee_tcb_svn2 is not None:
        current, loaded = _with_module(info, platform, reached, platform.tee_tcb_svn2)
        now = _converge(current.status, loaded.status if loaded else UP_TO_DATE)
        if now == REVOKED:
            raise EvidenceRefused("the TCB level of the loaded module is revoked")
        if status in _BEHIND and now not in _BEHIND and qe.status == UP_TO_DATE:
            configuration = "Configuration" in status or "Configuration" in now
            status = "TDRelaunchAdvised" + ("ConfigurationNeeded" if configuration else "")
    # (d) The quoting enclave.
    status = _converge(status, qe.status)
    if status == REVOKED:
        raise EvidenceRefused("the TCB level is revoked")
    advisories = {*matched.advisories, *(module.advisories if module else ()), *qe.advisories}
    # (e) The platform is as old as the older of its level and its module's; Intel writes all dates
    # alike, so they compare as text.
    date = min(matched.date, module.date) if module else matched.date
    return TcbResult(status, date, tuple(sorted(advisories)))


def _with_module(
    info: Members, platform: Platform, reached: Sequence[Level], svn: bytes
) -> tuple[Level, SvnLevel | None]:
    """The platform's level with a module of these SVNs, and the module's own."""
    matched = next((level for level in reached if _tdx_reaches(svn, level)), None)
    if matched is None:
        raise EvidenceRefused("the platform reaches no TCB level")
    return matched, _module_level(info, platform, svn)


def qe_level(levels: Sequence[SvnLevel], svn: int) -> SvnLevel:
    """The quoting enclave's level: the first whose SVN it reaches.

    Raises:
        EvidenceRefused: it reaches none.
    """
    found = next((level for level in levels if svn >= level.svn), None)
    if found is None:
        raise EvidenceRefused("the quoting enclave reaches no TCB level")
    return _judged(found)


def _components(tcb: Members, name: str) -> tuple[int, ...]:
    values = tuple(item.integer("svn", 0xFF) for item in tcb.objects(name))
    if len(values) != COMPONENTS:
        raise FormatError(f"{tcb.where}: {name} has {len(values)} components, expected 16")
    return values


def _sgx_reaches(platform: Platform, level: Level) -> bool:
    return platform.pce_svn >= level.pce_svn and all(
        own >= least for own, least in zip(platform.components, level.sgx, strict=True)
    )


def _tdx_reaches(svn: bytes, level: Level) -> bool:
    # With a module that has an identity list, its version is judged there and not here.
    first = 2 if svn[1] else 0
    return all(own >= least for own, least in zip(svn[first:], level.tdx[first:], strict=True))


def _identity(info: Members, major: int) -> Module:
    wanted = f"TDX_{major:02X}"
    found = [item for item in info.objects("tdxModuleIdentities", optional=True)
             if item.text("id").upper() == wanted]  # fmt: skip
    if len(found) != 1:
        raise EvidenceRefused(f"{len(found)} TDX module identities {wanted}, expected one")
    return _module(found[0], svn_levels(found[0].objects("tcbLevels")))


def _module(item: Members, levels: tuple[SvnLevel, ...]) -> Module:
    return Module(
        signer=item.hex("mrsigner", 48),
        attributes=item.hex("attributes", 8),
        mask=item.hex("attributesMask", 8),
        levels=levels,
    )


def _module_level(info: Members, platform: Platform, svn: bytes) -> SvnLevel | None:
    major = svn[1]
    # The plain identity must be there whatever the version; the numbered one decides if there is.
    module = _module(info.member("tdxModule"), ())
    if major:
        module = _identity(info, major)
    if platform.seam_signer != module.signer:
        raise EvidenceRefused("the TDX module has another signer")
    expected = bytes(own & mask for own, mask in zip(module.attributes, module.mask, strict=True))
    if platform.seam_attributes != expected:
        raise EvidenceRefused("the TDX module has other attributes")
    if not major:
        return None
    found = next((level for level in module.levels if svn[0] >= level.svn), None)
    if found is None:
        raise EvidenceRefused("the TDX module reaches no TCB level")
    return _judged(found)


def _judged(level: SvnLevel) -> SvnLevel:
    if level.status not in SVN_STATUS:
        raise EvidenceRefused(f"{level.status} is no status of a module or quoting enclave")
    return level


def _converge(status: str, other: str) -> str:
    if REVOKED in (status, other):
        return REVOKED
    return _WORSE.get(status, status) if other == OUT_OF_DATE else status


def check_masked(expected: bytes, mask: bytes, observed: bytes) -> bool:
    """Whether ``observed`` has the expected bits wherever the mask is set."""
    return all(
        (one & bits) == (other & bits)
        for one, bits, other in zip(expected, mask, observed, strict=True)
    )


