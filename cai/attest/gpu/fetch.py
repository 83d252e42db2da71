"""Fetching reference files and revocation answers from NVIDIA: the one part that uses the network.

Verification never comes here. Only what verifies is kept, as the exact bytes that were given; an
answer that says revoked is kept like any other. Answers are asked for without a nonce, since they
are to be used more than once; their age is judged when they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import httpx
from cryptography import x509

from cai.attest.certificates import common_name, load_chain, verify_chain
from cai.attest.evidence import DeviceEvidence
from cai.attest.gpu.certificates import describe
from cai.attest.gpu.measurements import rim_ids
from cai.attest.gpu.ocsp import (
    RESPONDER,
    Link,
    authenticate_answer,
    build_request,
    device_links,
    rim_links,
)
from cai.attest.gpu.report import parse_report
from cai.attest.gpu.rim import verify_rim
from cai.attest.gpu.rim_store import MAX_ANSWER, decode_answer
from cai.errors import (
    EvidenceRefused,
    FormatError,
    LimitExceeded,
    PeerError,
    PeerUnreachable,
    from_os_error,
)

RIM_SERVICE = "https://rim.attestation.nvidia.com"
"""NVIDIA's service of reference files."""

TIMEOUT_S = 30.0
"""Longest wait for one answer, seconds."""

EXPECTED = (PeerError, FormatError, LimitExceeded, EvidenceRefused)
"""What makes one file or answer missing without ending the others."""

_IDENTIFIER = re.compile(r"NV_[A-Z0-9_.-]{1,200}")


@dataclass(frozen=True, slots=True)
class GpuSource:
    """Where reference files and revocation answers come from: base URLs."""

    rims: str = RIM_SERVICE
    ocsp: str = RESPONDER


@dataclass(frozen=True, slots=True)
class Fetched:
    """What was fetched for some devices.

    Attributes:
        rims: identifier to the file.
        answers: serial number of a certificate to the answer about it, DER.
        missing: what could not be had, with the reason.
    """

    rims: Mapping[str, bytes] = field(default_factory=dict)
    answers: Mapping[int, bytes] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    def save(self, rims: Path | None, answers: Path | None) -> None:
        """Write files for ``load_rims`` and ``load_ocsp``, over older ones of the same name.

        Raises:
            FormatError: an identifier is no file name.
            InputError, StorageError: a directory cannot be written.
        """
        parts = [(rims, f"{_plain(name)}.xml", data) for name, data in self.rims.items()]
        parts += [(answers, f"{serial:040x}.der", data) for serial, data in self.answers.items()]
        for directory, name, data in parts:
            if directory is None:
                continue
            try:
                directory.mkdir(parents=True, exist_ok=True)
                part = directory / f"{name}.part"
                part.write_bytes(data)
                part.replace(directory / name)
            except OSError as error:
                raise from_os_error(error, f"write {directory / name}") from error


def fetch_rim(
    client: httpx.Client, source: GpuSource, identifier: str, *, root: bytes, now: datetime
) -> bytes:
    """Fetch one reference file and verify it.

    Args:
        client: makes the requests.
        source: where from.
        identifier: as ``rim_ids`` names it.
        root: DER of the pinned root of reference measurements.
        now: time at which it must be valid.

    Raises:
        PeerUnreachable, PeerError: the service does not answer, or has no such file.
        FormatError: the identifier is none of NVIDIA's.
        FormatError, LimitExceeded, EvidenceRefused: what it gives does not verify.
    """
    url = f"{source.rims.rstrip('/')}/v1/rim/{_plain(identifier)}"
    document = decode_answer(_ask(client, "GET", url))
    verify_rim(document, root=root, now=now)
    return document


def fetch_answer(client: httpx.Client, source: GpuSource, link: Link, *, now: datetime) -> bytes:
    """Ask whether one certificate is revoked.

    Args:
        client: makes the requests.
        source: where from.
        link: the certificate and its issuer.
        now: the current time.

    Returns:
        The answer, which is the issuer's and about that certificate, whatever it says.

    Raises:
        PeerUnreachable, PeerError: the responder does not answer.
        FormatError, LimitExceeded, EvidenceRefused: what it gives is no such answer.
    """
    certificate, issuer = link
    data = _ask(client, "POST", source.ocsp, build_request(certificate, issuer))
    authenticate_answer(data, certificate=certificate, issuer=issuer, now=now)
    return data


def fetch_for(
    client: httpx.Client, source: GpuSource, devices: Iterable[DeviceEvidence], *, root: bytes,
    rim_root: bytes, now: datetime,
) -> Fetched:  # fmt: skip
    """Fetch whatever the verification of some devices will ask for.

    Args:
        client: makes the requests.
        source: where from.
        devices: evidence, of any age; chains must verify.
        root: DER of the pinned root of device certificates.
        rim_root: DER of the pinned root of reference measurements.
        now: the current time.

    Raises:
        FormatError, LimitExceeded, EvidenceRefused: a device's report or chain cannot be used.
    """
    rims: dict[str, bytes] = {}
    links: dict[Link, None] = {}
    missing: dict[str, str] = {}
    for evidence in devices:
        report = parse_report(evidence.report)
        chain = load_chain(evidence.chain, what="device chain")
        device = describe(chain)
        verify_chain(chain, root=root, now=now)
        links |= dict.fromkeys(device_links(chain))
        for identifier in rim_ids(report, device).values():
            if identifier in rims or identifier in missing:
                continue
            try:
                document = fetch_rim(client, source, identifier, root=rim_root, now=now)
            except EXPECTED as error:
                missing[identifier] = error.message
                continue
            rims[identifier] = document
            links |= dict.fromkeys(rim_links(verify_rim(document, root=rim_root, now=now).chain))
    answers: dict[int, bytes] = {}
    for link in links:
        try:
            answers[link[0].serial_number] = fetch_answer(client, source, link, now=now)
        except EXPECTED as error:
            missing[_title(link[0])] = error.message
    return Fetched(rims, answers, tuple(f"{name}: {text}" for name, text in missing.items()))


def _plain(identifier: str) -> str:
    # Identifiers are made from what an unverified report says, and become paths.
    if not _IDENTIFIER.fullmatch(identifier):
        raise FormatError(f"{identifier[:100]!r} is no identifier of a reference file")
    return identifier


def _title(certificate: x509.Certificate) -> str:
    return f"{common_name(certificate) or 'certificate'} {certificate.serial_number:x}"


def _ask(client: httpx.Client, method: str, url: str, body: bytes | None = None) -> bytes:
    headers = {"Content-Type": "application/ocsp-request"} if body is not None else {}
    content = b""
    try:
        with client.stream(
            method, url, content=body, headers=headers, timeout=TIMEOUT_S
        ) as answer:
            for part in answer.iter_bytes():
                content += part
                if len(content) > MAX_ANSWER:
                    raise LimitExceeded(f"{url}: more than {MAX_ANSWER} bytes")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise PeerUnreachable(
            f"{url} does not answer: {type(error).__name__}",
            hint="fetch on a machine with a network and carry the directories over",
        ) from error
    if answer.status_code != httpx.codes.OK:
        raise PeerError(f"{url} answers {answer.status_code}")
    return content
