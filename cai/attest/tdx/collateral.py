"""Collateral: Intel's signed statements about platforms, kept beside the verifier.

A file is one JSON object of the shape of dcap-qvl's ``QuoteCollateralV3``; a directory or a tar
archive of them is a store, found by FMSPC and PCK certificate authority. Nothing here is trusted:
signatures and windows are checked at each verification. There is no network here;
``cai.attest.tdx.fetch`` fetches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509

from cai import jcs
from cai.attest.certificates import LIBRARY_ERRORS, MAX_PEM
from cai.attest.tdx.bundle import read_bundle
from cai.errors import FormatError, InputMissing, LimitExceeded, from_os_error

MAX_COLLATERAL_FILE = 1024 * 1024
"""Largest collateral file that is read, bytes."""

MAX_COLLATERAL_FILES = 1024
"""Most collateral files in one store."""

MAX_BUNDLE = 64 * 1024 * 1024
"""Largest bundle that is read, bytes."""

MEMBERS = (
    "pck_crl_issuer_chain", "root_ca_crl", "pck_crl", "tcb_info_issuer_chain", "tcb_info",
    "tcb_info_signature", "qe_identity_issuer_chain", "qe_identity", "qe_identity_signature",
)  # fmt: skip
"""Members of a collateral file, all strings (evidence.md §1.3).

The optional ``pck_certificate_chain`` of that shape is refused: it would replace the chain inside
the quote, so the engine would verify other bytes than the parser read.
"""


@dataclass(frozen=True, slots=True)
class Collateral:
    """One platform family's collateral.

    Attributes:
        fmspc: 12 lower-case hex digits.
        ca: ``platform`` or ``processor``.
        text: the JSON text, given to the engine as it is.
        issued: the latest issue date of its parts; before it nothing verifies.
        expires: the earliest expiry of its parts (certificates not counted).
        eval_data_number: TCB evaluation data number, the generation of the TCB information.
        signed: when Intel signed the older of TCB information and QE identity.
        windows: issue and expiry of each part: ``tcb_info``, ``qe_identity``, ``pck_crl``,
            ``root_ca_crl``.
    """

    fmspc: str
    ca: str
    text: str
    issued: datetime
    expires: datetime
    eval_data_number: int
    signed: datetime
    windows: Mapping[str, tuple[datetime, datetime]]

    def covers(self, at: datetime) -> bool:
        """Whether ``at`` lies in the validity window."""
        return self.issued <= at <= self.expires


class CollateralStore:
    """Collateral by FMSPC and certificate authority; newest first where there are several."""

    def __init__(self, items: Iterable[Collateral]) -> None:
        found: dict[tuple[str, str], list[Collateral]] = {}
        for item in items:
            found.setdefault((item.fmspc, item.ca), []).append(item)
        for several in found.values():
            several.sort(key=lambda item: item.issued, reverse=True)
        self._found: Mapping[tuple[str, str], list[Collateral]] = found

    @classmethod
    def empty(cls) -> CollateralStore:
        """A store without collateral, under which no quote verifies."""
        return cls(())

    def find(self, fmspc: str, ca: str, at: datetime | None = None) -> Collateral | None:
        """The newest collateral for a platform family.

        Args:
            fmspc: 12 hex digits, either case.
            ca: ``platform`` or ``processor``.
            at: prefer the newest whose window holds this time.

        Returns:
            The collateral, perhaps expired when nothing fresher is there, or ``None``.
        """
        several = self._found.get((fmspc.lower(), ca), [])
        fresh = [item for item in several if at is None or item.covers(at)]
        return next(iter(fresh or several), None)

    def __iter__(self) -> Iterator[Collateral]:
        """Every item, by FMSPC and authority, newest first."""
        for _, several in sorted(self._found.items()):
            yield from several

    def __len__(self) -> int:
        return sum(len(several) for several in self._found.values())


def load_collateral(path: Path) -> CollateralStore:
    """Load a directory or a bundle of collateral files (``*.json``).

    A bundle is an uncompressed tar archive of such files. Files for SGX are skipped: no quote that
    is accepted here can use them.

    Raises:
        InputMissing, InputError, StorageError: the directory or a file cannot be read.
        FormatError, LimitExceeded: a file is not collateral.
    """
    if not path.exists():
        raise InputMissing(f"collateral {path} does not exist", hint="check the path")
    named = _directory(path) if path.is_dir() else read_bundle(_read(path, MAX_BUNDLE), str(path))
    items = [parse_collateral(data, where=name) for name, data in named]
    return CollateralStore(item for item in items if item is not None)


def _directory(path: Path) -> list[tuple[str, bytes]]:
    try:
        files = sorted(item for item in path.iterdir() if item.suffix == ".json")
    except OSError as error:
        raise from_os_error(error, f"list collateral {path}") from error
    if len(files) > MAX_COLLATERAL_FILES:
        raise LimitExceeded(f"collateral {path}: more than {MAX_COLLATERAL_FILES} files")
    return [(str(item), _read(item, MAX_COLLATERAL_FILE)) for item in files]


def parse_collateral(data: bytes, *, where: str) -> Collateral | None:
    """Parse one collateral file; its index terms come from the parts that Intel signs.

    Args:
        data: the file.
        where: names it in errors.

    Returns:
        The collateral, or ``None`` when it is for SGX.

    Raises:
        FormatError, LimitExceeded: it is not collateral.
    """
    members = _members(data, where)
    tcb = _signed_json(members["tcb_info"], f"{where}: tcb_info")
    identity = _signed_json(members["qe_identity"], f"{where}: qe_identity")
    if tcb.get("id") != "TDX":
        return None
    fmspc, number = tcb.get("fmspc"), tcb.get("tcbEvaluationDataNumber")
    if not isinstance(fmspc, str) or len(fmspc) != 12 or not _is_hex(fmspc):
        raise FormatError(f"{where}: tcb_info has no FMSPC of 12 hex digits")
    if not isinstance(number, int) or isinstance(number, bool):
        raise FormatError(f"{where}: tcb_info has no tcbEvaluationDataNumber")
    pck_crl = _crl(members["pck_crl"], f"{where}: pck_crl")
    root_crl = _crl(members["root_ca_crl"], f"{where}: root_ca_crl")
    windows = {
        "tcb_info": _json_window(tcb, f"{where}: tcb_info"),
        "qe_identity": _json_window(identity, f"{where}: qe_identity"),
        "pck_crl": _crl_window(pck_crl, f"{where}: pck_crl"),
        "root_ca_crl": _crl_window(root_crl, f"{where}: root_ca_crl"),
    }
    return Collateral(
        fmspc=fmspc.lower(),
        ca=_authority(pck_crl, where),
        text=data.decode("utf-8"),
        issued=max(start for start, _ in windows.values()),
        expires=min(end for _, end in windows.values()),
        eval_data_number=number,
        signed=min(windows[part][0] for part in ("tcb_info", "qe_identity")),
        windows=windows,
    )


def members_of(collateral: Collateral) -> dict[str, str]:
    """The members of parsed collateral by name, each a string.

    Raises:
        FormatError, LimitExceeded: the text is not collateral.
    """
    return _members(collateral.text.encode("utf-8"), "collateral")


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise from_os_error(error, f"read collateral {path}") from error
    if len(data) > limit:
        raise LimitExceeded(f"collateral {path}: more than {limit} bytes")
    return data


def _members(data: bytes, where: str) -> dict[str, str]:
    value = jcs.parse(data, what=where, limit=MAX_COLLATERAL_FILE)
    if not isinstance(value, dict) or set(value) != set(MEMBERS):
        wrong = set(value) ^ set(MEMBERS) if isinstance(value, dict) else set()
        raise FormatError(f"{where}: not collateral; missing or unknown: {sorted(wrong)[:4]}")
    if not all(isinstance(item, str) for item in value.values()):
        raise FormatError(f"{where}: every member must be a string")
    for name in ("pck_crl_issuer_chain", "tcb_info_issuer_chain", "qe_identity_issuer_chain"):
        if len(value[name]) > MAX_PEM:
            raise LimitExceeded(f"{where}: {name} is longer than {MAX_PEM} bytes")
    return value


def _signed_json(text: str, where: str) -> dict[str, Any]:
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FormatError(f"{where}: lone surrogate") from error
    value = jcs.parse(data, what=where, limit=MAX_COLLATERAL_FILE)
    if not isinstance(value, dict):
        raise FormatError(f"{where}: not a JSON object")
    return value


def _json_window(value: dict[str, Any], where: str) -> tuple[datetime, datetime]:
    times = []
    for name in ("issueDate", "nextUpdate"):
        text = value.get(name)
        try:
            moment = datetime.fromisoformat(text if isinstance(text, str) else "")
            if moment.tzinfo is None:
                raise FormatError(f"{where}: {name} has no time zone")
            times.append(moment.astimezone(UTC))
        except (ValueError, OverflowError) as error:
            raise FormatError(f"{where}: {name} is not a time") from error
    return times[0], times[1]


def _crl(text: str, where: str) -> x509.CertificateRevocationList:
    try:
        return x509.load_der_x509_crl(bytes.fromhex(text))
    except LIBRARY_ERRORS as error:
        raise FormatError(f"{where}: not the hex of a DER revocation list") from error


def _crl_window(crl: x509.CertificateRevocationList, where: str) -> tuple[datetime, datetime]:
    try:
        start, end = crl.last_update_utc, crl.next_update_utc
    except LIBRARY_ERRORS as error:
        raise FormatError(f"{where}: no usable dates") from error
    return start, end or datetime.min.replace(tzinfo=UTC)


def _authority(crl: x509.CertificateRevocationList, where: str) -> str:
    try:
        names = [str(item.value) for item in crl.issuer]
    except LIBRARY_ERRORS as error:
        raise FormatError(f"{where}: pck_crl: unusable issuer") from error
    for authority in ("Platform", "Processor"):
        if any(f"PCK {authority} CA" in name for name in names):
            return authority.lower()
    raise FormatError(f"{where}: pck_crl is of neither the Platform nor the Processor CA")


def _is_hex(text: str) -> bool:
    return set(text) <= set("0123456789abcdefABCDEF")
