"""What the simulated Intel says of a platform: TCB information and QE identity, with dials.

What dcap-qvl demands of these documents was found by running it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256, sha384

FMSPC = b"SIMUL\x00"
"""Platform family of simulated platforms; spells what it is."""

EVAL_DATA_NUMBER = 19

CPU_SVN = bytes((3, 3, 2, 2, 4, 1, 0, 5)) + bytes(8)
PCE_SVN = 13
QE_ISV_SVN = 6

TEE_TCB_SVN = bytes((6, 1, 3)) + bytes(13)
"""Module build 6 of the TDX 1.5 line, loader component 3."""

MR_SEAM = sha384(b"SIMULATED TDX module 1.5 build 6").digest()
QE_MR_SIGNER = sha256(b"SIMULATED quoting enclave signer").digest()
QE_MR_ENCLAVE = sha256(b"SIMULATED quoting enclave").digest()
QE_ATTRIBUTES = bytes.fromhex("1500000000000000e700000000000000")

TCB_DATE = "2025-05-14T00:00:00Z"
OLD_TCB_DATE = "2023-08-09T00:00:00Z"
"""TCB date of levels that are behind."""

COLLATERAL_LIFETIME = timedelta(days=30)
"""Validity of simulated collateral from its making, as Intel's."""

COLLATERAL_BACKDATED = timedelta(hours=1)
"""How long before its making collateral is valid, so that clocks may differ."""

REVOCABLE = ("pck", "platform_ca", "tcb_signing")
"""Certificates that a revocation list can name."""


@dataclass(frozen=True, slots=True)
class CollateralSettings:
    """How the simulated Intel judges the platform.

    Attributes:
        tcb_status: status of the platform's level, any of Intel's words, ``Revoked`` too.
        module_status: status of the TDX module's level.
        qe_status: status of the quoting enclave's level.
        advisory_ids: advisories of the platform's level.
        tcb_date: TCB date of the platform's level.
        eval_data_number: generation of the TCB information.
        newest_module_svn: above 6 there is a newer module level, and the quote's own level has
            ``module_status`` (say ``OutOfDate``); a TD 1.5 quote whose ``tee_tcb_svn2`` reaches the
            newer one is advised to relaunch.
        known_platform: without it no level matches the platform.
        revoked: of ``REVOCABLE``.
        backdated: how long before its making collateral is valid.
        lifetime: how long after its making it is; negative makes it expired.
        tcb_info: members that replace those of the TCB information before it is signed.
        qe_identity: members that replace those of the QE identity before it is signed.
    """

    tcb_status: str = "UpToDate"
    module_status: str = "UpToDate"
    qe_status: str = "UpToDate"
    advisory_ids: tuple[str, ...] = ()
    tcb_date: str = TCB_DATE
    eval_data_number: int = EVAL_DATA_NUMBER
    newest_module_svn: int = TEE_TCB_SVN[0]
    known_platform: bool = True
    revoked: tuple[str, ...] = ()
    backdated: timedelta = COLLATERAL_BACKDATED
    lifetime: timedelta = COLLATERAL_LIFETIME
    tcb_info: Mapping[str, object] = field(default_factory=dict)
    qe_identity: Mapping[str, object] = field(default_factory=dict)


def tcb_info(window: Mapping[str, object], settings: CollateralSettings) -> dict[str, object]:
    """The TCB information, not signed.

    Args:
        window: issue date, next update and generation.
        settings: the dials.
    """
    zero = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
    lowest = PCE_SVN if settings.known_platform else PCE_SVN + 1
    level: dict[str, object] = {
        "tcb": {
            "sgxtcbcomponents": [{"svn": value} for value in CPU_SVN],
            "pcesvn": lowest,
            "tdxtcbcomponents": [{"svn": value} for value in TEE_TCB_SVN],
        },
        "tcbDate": settings.tcb_date,
        "tcbStatus": settings.tcb_status,
    }
    if settings.advisory_ids:
        level["advisoryIDs"] = list(settings.advisory_ids)
    module = {
        "id": f"TDX_{TEE_TCB_SVN[1]:02X}",
        **zero,
        "tcbLevels": _module_levels(settings),
    }
    return {
        "id": "TDX",
        "version": 3,
        **window,
        "fmspc": FMSPC.hex().upper(),
        "pceId": "0000",
        "tcbType": 0,
        "tdxModule": zero,
        "tdxModuleIdentities": [module],
        "tcbLevels": [level],
        **settings.tcb_info,
    }


def qe_identity(window: Mapping[str, object], settings: CollateralSettings) -> dict[str, object]:
    """The identity of the TDX quoting enclave, not signed."""
    return {
        "id": "TD_QE",
        "version": 2,
        **window,
        "miscselect": "00000000",
        "miscselectMask": "FFFFFFFF",
        "attributes": "11000000000000000000000000000000",
        "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
        "mrsigner": QE_MR_SIGNER.hex().upper(),
        "isvprodid": 2,
        "tcbLevels": [_isv_level(QE_ISV_SVN, settings.qe_status)],
        **settings.qe_identity,
    }


def _module_levels(settings: CollateralSettings) -> list[dict[str, object]]:
    own = TEE_TCB_SVN[0]
    newest = settings.newest_module_svn
    levels = [_isv_level(newest, "UpToDate")] if newest > own else []
    return [*levels, _isv_level(own, settings.module_status)]


def _isv_level(svn: int, status: str) -> dict[str, object]:
    date = TCB_DATE if status == "UpToDate" else OLD_TCB_DATE
    return {"tcb": {"isvsvn": svn}, "tcbDate": date, "tcbStatus": status}
