"""An attestation service over REST, as stock TNG calls it (reference "TNG" §2.3)."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
from cryptography import x509

from cai import jcs
from cai.attest.evidence import DeviceEvidence
from cai.attest.rcar import encode_device
from cai.errors import FormatError, PeerError, PeerUnreachable, PolicyDenied, SettingError
from cai.settings import read_settings_file
from tng.config.trust import ServiceVerify
from tng.stock.certificate import CocoEvidence
from tng.stock.token import MAX_TOKEN

TIMEOUT_S = 20.0
"""Longest wait for an answer, seconds; a service may fetch collateral first."""

CONNECT_TIMEOUT_S = 5.0
"""Longest wait for a connection, seconds."""

MAX_CERTIFICATES = 256 * 1024
"""Largest PEM that is fetched, bytes."""

OLD_SHAPE = "missing field `tee`"
"""What Trustee's older services say to the newer request."""

NO_CHALLENGE = "Failed to get inner tee"
"""What upstream's service says to a challenge request that names no TEE."""


@dataclass(frozen=True, slots=True)
class Device:
    """Evidence of a device beside the main one."""

    tee: str
    evidence: bytes


class AppraisalService:
    """One service.

    Args:
        address: base URL, ends in ``/``; a path in it is kept.
        headers: for each request.
    """

    def __init__(self, address: str, headers: Sequence[tuple[str, str]] = ()) -> None:
        self.address = address
        # A proxy from the environment could be this very gateway.
        self._http = httpx.AsyncClient(
            trust_env=False,
            headers=list(headers),
            timeout=httpx.Timeout(TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
        )

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def certificates(self) -> tuple[x509.Certificate, ...]:
        """``GET certificate``: the roots of its tokens.

        Raises:
            PeerUnreachable, PeerError: it does not answer, or has none.
            FormatError: not PEM.
        """
        body = await self._call("GET", "certificate", None, limit=MAX_CERTIFICATES)
        return parse_roots(body, f"certificate of {self.address}")

    async def challenge(self) -> str | None:
        """``POST challenge``: its challenge token; ``None`` where it gives none.

        Raises:
            PeerUnreachable, PeerError: it does not answer, or refuses.
        """
        try:
            body = await self._call("POST", "challenge", {})
        except PeerError as error:
            if NO_CHALLENGE in error.message:
                return None
            raise
        value = jcs.parse(body, what="challenge", limit=MAX_TOKEN)
        if not isinstance(value, dict):
            return None
        extra = value.get("extra_params", value.get("extra-params"))
        token = extra.get("jwt") if isinstance(extra, dict) else None
        return token if isinstance(token, str) else None

    async def appraise(
        self, evidence: CocoEvidence, devices: Sequence[Device], policy_ids: Sequence[str]
    ) -> str:
        """``POST attestation``: a token about this evidence.

        Raises:
            PeerUnreachable: it does not answer.
            PeerError: it refuses, with its reason.
        """
        claims = evidence.claims
        main = {
            "tee": evidence.tee,
            "evidence": _b64u(evidence.evidence),
            "runtime_data": {"structured": claims},
            "init_data": None,
            "runtime_data_hash_algorithm": "sha384",
        }
        others = [
            {
                "tee": device.tee,
                "evidence": _b64u(device.evidence),
                "runtime_data": None,
                "init_data": None,
                "runtime_data_hash_algorithm": None,
            }
            for device in devices
        ]
        request = {"verification_requests": [main, *others], "policy_ids": list(policy_ids)}
        try:
            body = await self._call("POST", "attestation", request)
        except PeerError as error:
            if OLD_SHAPE not in error.message:
                raise
            old = {**main, "init_data_hash_algorithm": "sha384", "policy_ids": list(policy_ids)}
            body = await self._call("POST", "attestation", old)
        return _token(body)

    async def appraise_raw(
        self,
        evidence: dict[str, str | None],
        raw: bytes,
        statement: bytes,
        devices: Sequence[Device],
        policy_ids: Sequence[str],
    ) -> str:
        """A token about evidence whose report data is these 64 bytes.

        Our service also reads ``cai_statement``, whose digest they hold; others ignore it.

        Raises:
            PeerUnreachable: it does not answer.
            PeerError: it refuses, with its reason.
        """
        main = {
            "tee": "tdx",
            "evidence": _b64u(jcs.canonical(evidence)),
            "runtime_data": {"raw": _b64u(raw)},
            "init_data": None,
            "runtime_data_hash_algorithm": "sha384",
            "cai_statement": _b64u(statement),
        }
        others = [
            {"tee": device.tee, "evidence": _b64u(device.evidence), "runtime_data": None,
             "init_data": None, "runtime_data_hash_algorithm": None}
            for device in devices
        ]  # fmt: skip
        request = {"verification_requests": [main, *others], "policy_ids": list(policy_ids)}
        return _token(await self._call("POST", "attestation", request))

    async def _call(
        self, method: str, route: str, body: Any, *, limit: int = MAX_TOKEN
    ) -> bytes:
        url = self.address + route
        name = f"attestation service {self.address}"
        hint = "start the attestation service, or check verify.as_addr"
        try:
            async with (
                asyncio.timeout(TIMEOUT_S),
                self._http.stream(method, url, json=body) as response,
            ):
                data = bytearray()
                async for chunk in response.aiter_bytes():
                    data += chunk
                    if len(data) > limit:
                        raise PeerError(f"{name} answers more than {limit} bytes")
        except (httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError, UnicodeError) as error:
            reason = str(error) or "no answer in time"
            raise PeerUnreachable(f"{name} cannot be reached: {reason}", hint=hint) from error
        if response.status_code != 200:
            told = data[:512].decode("utf-8", "replace").replace("\n", " ")
            raise PeerError(f"{name} answers HTTP {response.status_code} to {route}: {told}")
        return bytes(data)


async def trusted_roots(
    settings: ServiceVerify, service: AppraisalService | None
) -> tuple[x509.Certificate, ...] | None:
    """The roots that a token's signer must lead to; ``None`` takes any signer.

    A certificate that is fetched over a network without authentication is whoever answered
    (decisions §7, Proxy).

    Raises:
        PolicyDenied: it could only be fetched so, and the settings do not say that this will do.
        CaiError: a file or the service cannot be read.
    """
    if settings.skip_certificate:
        return None
    if settings.trusted_certs is not None:
        roots: list[x509.Certificate] = []
        for path in settings.trusted_certs:
            data = await asyncio.to_thread(read_settings_file, path, what="certificate")
            roots += parse_roots(data, str(path))
        return tuple(roots)
    if service is None:
        raise SettingError("no certificate of the attestation service is given")
    if not settings.trust_fetched and not _authenticated(settings.as_addr):
        raise PolicyDenied(
            f"the certificate of {settings.as_addr} would be taken from whoever answers there",
            hint="give trusted_certs_paths, use https, or say unsafe_trust_fetched_as_certificate",
        )
    return await service.certificates()


class TrustedRoots:
    """The roots of one ``verify``, read or fetched at their first use and kept.

    Args:
        settings: what is trusted.
        service: where they are fetched; ``None`` without an address.
    """

    def __init__(self, settings: ServiceVerify, service: AppraisalService | None) -> None:
        self._settings = settings
        self._service = service
        self._known: tuple[tuple[x509.Certificate, ...] | None] | None = None

    async def get(self) -> tuple[x509.Certificate, ...] | None:
        """The roots; ``None`` takes any signer.

        Raises:
            CaiError: as ``trusted_roots``.
        """
        if self._known is None:
            self._known = (await trusted_roots(self._settings, self._service),)
        return self._known[0]


def nvidia_device(device: DeviceEvidence) -> Device:
    """One GPU's evidence as the service reads it."""
    value = {"device_evidence_list": [encode_device(device)]}
    return Device("nvidia", jcs.canonical(value))


def parse_roots(data: bytes, where: str) -> tuple[x509.Certificate, ...]:
    """Certificates of a PEM text.

    Raises:
        FormatError: there is none, or one cannot be read.
    """
    try:
        return tuple(x509.load_pem_x509_certificates(data))
    except Exception as error:  # the library's exceptions share no base
        raise FormatError(f"{where}: no PEM certificates") from error


def devices_of(evidence: CocoEvidence) -> tuple[Device, ...]:
    """The devices in the additional evidence: ``{"<tee>": evidence, …}``.

    Raises:
        FormatError: of another form.
    """
    if evidence.additional is None or not evidence.additional.strip():
        return ()
    value = jcs.parse(evidence.additional, what="additional evidence", limit=16 * 1024 * 1024)
    if not isinstance(value, dict):
        raise FormatError("additional evidence: expected an object")
    return tuple(Device(tee, jcs.canonical(item)) for tee, item in value.items())


def _authenticated(address: str) -> bool:
    parts = urlsplit(address)
    if parts.scheme == "https" or parts.hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False


def _token(body: bytes) -> str:
    try:
        return body.decode("ascii").strip().strip('"')
    except UnicodeDecodeError as error:
        raise FormatError("the attestation service's token is not ASCII") from error


def _b64u(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")

