"""The vendors' services of a simulated platform over HTTP: PCS, RIM service, OCSP responder.

For tests of whoever fetches. Paths, bodies and headers are those of Intel's PCS version 4 and of
NVIDIA's services (evidence.md §1.6, §5.5, §5.6); listens on loopback only.

    >>> with SimulatedVendors(platform) as vendors:
    ...     fetch(vendors.url)
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qs, quote, urlsplit

from cai.attest.sim import intel, rim
from cai.attest.sim.platform import SimulatedPlatform
from cai.attest.sim.revocation import OcspSettings
from cai.attest.sim.tcb import FMSPC, CollateralSettings

MAX_REQUEST = 64 * 1024
"""Largest request body that is read, bytes."""

Answer = tuple[int, str, bytes, dict[str, str]]
"""Status, content type, body and further headers."""

Clock = Callable[[], datetime]


class SimulatedVendors:
    """A context in which the simulated vendors answer at ``url``.

    Args:
        platform: whose vendors they are.
        collateral: what Intel says; may be replaced while the server runs.
        ocsp: how NVIDIA's responder answers; may be replaced while the server runs.
        clock: when answers are made.

    Attributes:
        failures: path prefix to the status with which it fails, or to the body that is given in
            place of the true one.
        requests: method and target of every request, in order.
    """

    def __init__(
        self,
        platform: SimulatedPlatform,
        *,
        collateral: CollateralSettings | None = None,
        ocsp: OcspSettings | None = None,
        clock: Clock = lambda: datetime.now(UTC),
    ) -> None:
        self.platform = platform
        self.collateral = collateral
        self.ocsp = ocsp
        self.clock = clock
        self.failures: dict[str, int | bytes] = {}
        self.requests: list[str] = []
        vendors = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply(vendors.get(self.path))

            def do_POST(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(min(size, MAX_REQUEST))
                self._reply(vendors.post(self.path, body))

            def log_message(self, *_arguments: object) -> None:
                """Tests do not want a log."""

            def _reply(self, answer: Answer) -> None:
                status, kind, body, headers = answer
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        """The base to which every path of the vendors is appended."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> SimulatedVendors:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def get(self, target: str) -> Answer:
        """The answer to a GET."""
        self.requests.append(f"GET {target}")
        parts = urlsplit(target)
        failure = self._failure(parts.path)
        if failure is not None:
            return failure
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        name = parts.path.rpartition("/")[2]
        if parts.path.startswith("/v1/rim/"):
            return self._rim(name)
        members = intel.collateral(
            self.platform.processor, now=self.clock(), settings=self.collateral
        )
        # Root and intermediate lists go by more than one path: Intel's own, and a PCCS's.
        match parts.path:
            case "/tdx/certification/v4/tcb":
                if query.get("fmspc", "").lower() != FMSPC.hex():
                    return _refused(HTTPStatus.NOT_FOUND)
                return _signed("tcbInfo", "tcb_info", "TCB-Info-Issuer-Chain", members)
            case "/tdx/certification/v4/qe/identity":
                header = "SGX-Enclave-Identity-Issuer-Chain"
                return _signed("enclaveIdentity", "qe_identity", header, members)
            case "/sgx/certification/v4/pckcrl":
                if query.get("ca") != "platform":
                    return _refused(HTTPStatus.NOT_FOUND)
                chain = {"SGX-PCK-CRL-Issuer-Chain": quote(members["pck_crl_issuer_chain"])}
                return _list(members["pck_crl"], chain, raw=query.get("encoding") == "der")
            case "/sgx/certification/v4/rootcacrl":
                return _list(members["root_ca_crl"], {}, raw=False)
            case "/IntelSGXRootCA.der":
                return _list(members["root_ca_crl"], {}, raw=True)
            case "/tdx/certification/v4/tcbevaluationdatanumbers":
                return self._generations()
        return _refused(HTTPStatus.NOT_FOUND)

    def post(self, target: str, body: bytes) -> Answer:
        """The answer to a POST: an OCSP request at any path."""
        self.requests.append(f"POST {target}")
        failure = self._failure(urlsplit(target).path)
        if failure is not None:
            return failure
        answer = self.platform.responder(self.ocsp).answer(body, now=self.clock())
        return HTTPStatus.OK, "application/ocsp-response", answer, {}

    def _failure(self, path: str) -> Answer | None:
        for prefix, failure in self.failures.items():
            if path.startswith(prefix):
                if isinstance(failure, int):
                    return _refused(failure)
                return HTTPStatus.OK, "application/octet-stream", failure, {}
        return None

    def _rim(self, identifier: str) -> Answer:
        document = self.platform.rims().get(identifier.upper())
        if document is None:
            return _refused(HTTPStatus.NOT_FOUND)
        body = rim.service_answer(identifier, document)
        return HTTPStatus.OK, "application/json", body, {}

    def _generations(self) -> Answer:
        settings = self.collateral or CollateralSettings()
        body = {"tcbEvaluationDataNumbers": {"id": "TDX", "tcbEvalNumbers": [
            {"tcbEvaluationDataNumber": settings.eval_data_number}
        ]}}  # fmt: skip
        return HTTPStatus.OK, "application/json", json.dumps(body).encode(), {}


def _signed(outer: str, member: str, header: str, members: dict[str, str]) -> Answer:
    # The signed text must come out exactly as it was signed, so it is not encoded again.
    signature = members[f"{member}_signature"]
    body = f'{{"{outer}":{members[member]},"signature":"{signature}"}}'.encode()
    chain = quote(members[f"{member}_issuer_chain"])
    return HTTPStatus.OK, "application/json", body, {header: chain}


def _list(text: str, headers: dict[str, str], *, raw: bool) -> Answer:
    if raw:
        return HTTPStatus.OK, "application/pkix-crl", bytes.fromhex(text), headers
    return HTTPStatus.OK, "text/plain", text.encode("ascii"), headers


def _refused(status: int) -> Answer:
    return status, "text/plain", b"", {}
