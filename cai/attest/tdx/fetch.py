"""Fetching collateral from Intel's service or a cache of it: the one part that uses the network.

Verification never comes here. Answers are kept as the exact texts that Intel signed, cut out of the
service's JSON and never written anew, and nothing is kept that does not verify.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import unquote, urlsplit

import httpx

from cai import jcs
from cai.attest.tdx.bundle import write_bundle
from cai.attest.tdx.collateral import Collateral, CollateralStore, parse_collateral
from cai.attest.tdx.signed import verify_collateral
from cai.errors import FormatError, LimitExceeded, PeerError, PeerUnreachable, UsageError

INTEL_PCS = "https://api.trustedservices.intel.com"
"""Intel's provisioning certification service."""

INTEL_ROOT_CRL = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"
"""Where Intel publishes the root's revocation list; a cache serves it at ``rootcacrl``."""

MAX_ANSWER = 1024 * 1024
"""Largest answer that is read, bytes."""

TIMEOUT_S = 30.0
"""Longest wait for one answer, seconds."""

AUTHORITIES = ("platform", "processor")

_SIGNED = re.compile(r',"signature":"([0-9a-fA-F]{128})"\}\s*\Z')
_VERSIONED = re.compile(r"/(sgx|tdx)/certification/v\d+/?\Z")


@dataclass(frozen=True, slots=True)
class Source:
    """Where collateral comes from.

    Attributes:
        pcs: base URL of a PCS or PCCS.
        root_crl: URL of the root's revocation list.
        update: ``standard`` or ``early``, the TCB recovery to follow.
        eval_data_number: exactly this generation of TCB information; 0 leaves it to ``update``.
    """

    pcs: str = INTEL_PCS
    root_crl: str = INTEL_ROOT_CRL
    update: str = "standard"
    eval_data_number: int = 0

    @classmethod
    def at(
        cls, pcs: str, *, root_crl: str = "", update: str = "standard", eval_data_number: int = 0
    ) -> Source:
        """A source at any base URL, with or without ``/sgx/certification/v4`` behind it.

        Raises:
            UsageError: not an http or https URL.
        """
        parts = urlsplit(pcs)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.query:
            raise UsageError(f"{pcs!r} is not the base URL of a PCS or PCCS")
        base = _VERSIONED.sub("", pcs.rstrip("/"))
        if not root_crl:
            own = f"{base}/sgx/certification/v4/rootcacrl"
            root_crl = INTEL_ROOT_CRL if base == INTEL_PCS else own
        return cls(base, root_crl, update, eval_data_number)


@dataclass(frozen=True, slots=True)
class _Answer:
    content: bytes
    headers: httpx.Headers


def fetch_collateral(
    client: httpx.Client, source: Source, *, fmspc: str, ca: str, root: bytes, now: datetime
) -> Collateral:
    """Fetch the collateral of one platform family and verify it.

    Args:
        client: makes the requests.
        source: where from.
        fmspc: 12 hex digits.
        ca: ``platform`` or ``processor``.
        root: DER of the pinned root.
        now: time at which it must be valid.

    Raises:
        PeerUnreachable, PeerError: the service does not answer, or with an error.
        FormatError, LimitExceeded: an answer has another form.
        EvidenceRefused: an answer does not verify.
    """
    if not re.fullmatch(r"[0-9a-fA-F]{12}", fmspc) or ca not in AUTHORITIES:
        raise UsageError(f"{fmspc!r}, {ca!r}: expected an FMSPC of 12 hex digits and its authority")
    generation = (
        {"tcbEvaluationDataNumber": str(source.eval_data_number)}
        if source.eval_data_number
        else {"update": source.update}
    )
    tdx, sgx = (f"{source.pcs}/{kind}/certification/v4" for kind in ("tdx", "sgx"))
    tcb = _get(client, f"{tdx}/tcb", {"fmspc": fmspc.lower(), **generation})
    identity = _get(client, f"{tdx}/qe/identity", generation)
    platforms = _get(client, f"{sgx}/pckcrl", {"ca": ca, "encoding": "der"})
    root_list = _get(client, source.root_crl, {})
    tcb_text, tcb_signature = split_signed(tcb.content, "tcbInfo")
    identity_text, identity_signature = split_signed(identity.content, "enclaveIdentity")
    members = {
        "pck_crl_issuer_chain": _chain(platforms, "SGX-PCK-CRL-Issuer-Chain"),
        "root_ca_crl": _revocation_list(root_list.content),
        "pck_crl": _revocation_list(platforms.content),
        "tcb_info_issuer_chain": _chain(tcb, "TCB-Info-Issuer-Chain", "SGX-TCB-Info-Issuer-Chain"),
        "tcb_info": tcb_text,
        "tcb_info_signature": tcb_signature,
        "qe_identity_issuer_chain": _chain(identity, "SGX-Enclave-Identity-Issuer-Chain"),
        "qe_identity": identity_text,
        "qe_identity_signature": identity_signature,
    }
    where = f"{source.pcs} for {fmspc}"
    found = parse_collateral(jcs.canonical(members), where=where)
    if found is None or (found.fmspc, found.ca) != (fmspc.lower(), ca):
        raise FormatError(f"{where}: the answer is for another platform family")
    verify_collateral(found, root=root, now=now)
    return found


def split_signed(body: bytes, name: str) -> tuple[str, str]:
    """Cut the signed text out of ``{"<name>":<text>,"signature":"<hex>"}``.

    Returns:
        The exact text, and the signature in hex.

    Raises:
        FormatError: the answer has another form.
    """
    try:
        text = body.decode("utf-8").lstrip()
    except UnicodeDecodeError as error:
        raise FormatError(f"{name}: not UTF-8") from error
    prefix = f'{{"{name}":'
    end = _SIGNED.search(text, max(len(text) - 256, 0))
    if not text.startswith(prefix + "{") or end is None:
        raise FormatError(f"{name}: not a signed object as a PCS answers")
    return text[len(prefix) : end.start()], end[1].lower()


def is_stale(collateral: Collateral, now: datetime) -> bool:
    """Whether less than half of the validity window is left, so that it should be fetched anew."""
    whole = collateral.expires - collateral.issued
    return collateral.expires - now < whole / 2 or now < collateral.issued


def bundle_of(items: Iterable[Collateral]) -> bytes:
    """A bundle of collateral, one file for each item."""
    return write_bundle(
        (f"{item.fmspc}-{item.ca}-{item.eval_data_number}-{item.issued:%Y%m%dT%H%M%SZ}.json",
         item.text.encode("utf-8"))
        for item in items
    )  # fmt: skip


def refreshed(
    client: httpx.Client, source: Source, kept: CollateralStore,
    wanted: Iterable[tuple[str, str]], *, root: bytes, now: datetime, anew: bool = False,
) -> tuple[list[Collateral], list[Collateral]]:
    """What a bundle should hold: fresh items as they are, stale and missing ones fetched.

    Args:
        client: makes the requests.
        source: where from.
        kept: what the bundle holds.
        wanted: further families, as (FMSPC, authority).
        root: DER of the pinned root.
        now: the current time.
        anew: fetch every one of them, however fresh.

    Returns:
        All items, and those among them that were fetched.
    """
    families = {(item.fmspc, item.ca) for item in kept}
    families |= {(name.lower(), ca) for name, ca in wanted}
    items: list[Collateral] = []
    fetched: list[Collateral] = []
    for fmspc, ca in sorted(families):
        found = kept.find(fmspc, ca, now)
        if anew or found is None or is_stale(found, now):
            found = fetch_collateral(client, source, fmspc=fmspc, ca=ca, root=root, now=now)
            fetched.append(found)
        items.append(found)
    return items, fetched


def _get(client: httpx.Client, url: str, query: dict[str, str]) -> _Answer:
    try:
        with client.stream("GET", url, params=query, timeout=TIMEOUT_S) as answer:
            content = b""
            for part in answer.iter_bytes():
                content += part
                if len(content) > MAX_ANSWER:
                    raise LimitExceeded(f"{url}: more than {MAX_ANSWER} bytes")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise PeerUnreachable(
            f"{url} does not answer: {type(error).__name__}",
            hint="on a machine without a network, fetch a bundle elsewhere and carry it over",
        ) from error
    if answer.status_code != httpx.codes.OK:
        raise PeerError(
            f"{url} answers {answer.status_code}",
            hint="is the FMSPC right, and is it of a TDX platform?" if query else None,
        )
    return _Answer(content, answer.headers)


def _chain(answer: _Answer, *names: str) -> str:
    for name in names:
        if name in answer.headers:
            return unquote(answer.headers[name])
    raise FormatError(f"the answer has no header {names[0]}")


def _revocation_list(content: bytes) -> str:
    """Hex of DER, whether the service gives DER or, as some caches do, its hex."""
    if content[:1] == b"\x30":  # a SEQUENCE; its hex would begin with "3"
        return content.hex()
    text = content.strip().decode("ascii", errors="replace")
    if len(text) % 2 or not re.fullmatch(r"[0-9a-fA-F]+", text):
        raise FormatError("a revocation list is neither DER nor its hex")
    return text.lower()
