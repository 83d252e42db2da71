"""Fetching reference files and revocation answers from a simulated vendor."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from cai.attest.anchors import TrustAnchors, simulated_anchors, vendor_anchors
from cai.attest.evidence import DeviceEvidence
from cai.attest.gpu.fetch import Fetched, GpuSource, fetch_for, fetch_rim
from cai.attest.gpu.ocsp_store import load_ocsp
from cai.attest.gpu.rim_store import MAX_ANSWER, load_rims
from cai.attest.gpu.verify import verify_devices
from cai.attest.verdict import Outcome
from cai.errors import EvidenceRefused, FormatError, LimitExceeded, PeerError, PeerUnreachable

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform

NONCE = b"\x05" * 32
NOW = datetime.now(UTC)
SOURCE = GpuSource("http://rim.invalid/", "http://ocsp.invalid")

Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture(scope="module")
def anchors(platform_dir: Path) -> TrustAnchors:
    return simulated_anchors(platform_dir / "anchors")


def vendor(platform: SimulatedPlatform, *, now: datetime = NOW) -> Handler:
    """NVIDIA's two services."""
    from cai.attest.sim.rim import service_answer

    rims, responder = platform.rims(), platform.responder()

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            assert request.url == "http://ocsp.invalid"
            assert request.headers["content-type"] == "application/ocsp-request"
            return httpx.Response(200, content=responder.answer(request.read(), now=now))
        name = request.url.path.removeprefix("/v1/rim/")
        if name not in rims:
            return httpx.Response(404)
        return httpx.Response(200, content=service_answer(name, rims[name]))

    return answer


def client(handler: Handler) -> httpx.Client:
    return httpx.Client(transport=httpx.MockTransport(handler))


def fetch(
    handler: Handler, devices: tuple[DeviceEvidence, ...], anchors: TrustAnchors
) -> Fetched:
    assert anchors.rim_root is not None
    return fetch_for(
        client(handler), SOURCE, devices, root=anchors.gpu_root, rim_root=anchors.rim_root,
        now=NOW,
    )  # fmt: skip


def test_everything_a_verification_asks_for(
    platform: SimulatedPlatform, anchors: TrustAnchors, tmp_path: Path
) -> None:
    devices = platform.devices(2).collect(NONCE)
    fetched = fetch(vendor(platform), devices, anchors)
    assert fetched.missing == ()
    assert len(fetched.rims) == 2
    fetched.save(tmp_path / "rims", tmp_path / "ocsp")
    fetched.save(tmp_path / "rims", tmp_path / "ocsp")
    fresh = platform.devices(2).collect(NONCE[::-1])
    result = verify_devices(
        fresh, nonce=NONCE[::-1], root=anchors.gpu_root, rim_root=anchors.rim_root,
        now=NOW + timedelta(hours=1), rims=load_rims(tmp_path / "rims"),
        ocsp=load_ocsp(tmp_path / "ocsp"),
    )  # fmt: skip
    assert result.facts is not None
    assert all(device.rims and device.ocsp_produced for device in result.facts)
    assert not any(item.outcome is Outcome.FAIL for item in result.checks)
    fetched.save(None, None)


def test_what_cannot_be_had_is_named(
    platform: SimulatedPlatform, anchors: TrustAnchors
) -> None:
    from cai.attest.sim.devices import DeviceSettings

    devices = platform.devices(1, DeviceSettings(driver_version="1.2.3")).collect(NONCE)
    fetched = fetch(vendor(platform), devices, anchors)
    assert len(fetched.rims) == 1
    (missing,) = fetched.missing
    assert missing.startswith("NV_GPU_DRIVER_GH100_1.2.3: ")
    down = fetch(lambda _: httpx.Response(503), devices, anchors)
    assert (down.rims, down.answers) == ({}, {})
    assert len(down.missing) == 2 + 3


@pytest.mark.parametrize("content", [b"", b"{}", b'{"rim":"PGEvPg=="}', b"x" * (MAX_ANSWER + 1)])
def test_nothing_that_does_not_verify_is_kept(
    platform: SimulatedPlatform, anchors: TrustAnchors, content: bytes
) -> None:
    devices = platform.devices(1).collect(NONCE)
    fetched = fetch(lambda _: httpx.Response(200, content=content), devices, anchors)
    assert (fetched.rims, fetched.answers) == ({}, {})
    assert len(fetched.missing) == 5


def test_a_revocation_is_kept(platform: SimulatedPlatform, anchors: TrustAnchors) -> None:
    from cai.attest.sim.revocation import OcspSettings

    responder = platform.responder(OcspSettings(status={"GH100 A01 GSP BROM": "revoked"}))
    devices = platform.devices(1).collect(NONCE)

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method != "POST":
            return httpx.Response(404)
        return httpx.Response(200, content=responder.answer(request.read(), now=NOW))

    assert len(fetch(answer, devices, anchors).answers) == 3


def test_devices_of_others(platform: SimulatedPlatform, anchors: TrustAnchors) -> None:
    with pytest.raises(EvidenceRefused):
        fetch(vendor(platform), platform.devices(1).collect(NONCE), vendor_anchors())


@pytest.mark.parametrize("version", ["../x", "a/b", "a%2fb", "a?b", "a\\b", "1" * 300])
def test_versions_do_not_become_paths(
    platform: SimulatedPlatform, anchors: TrustAnchors, tmp_path: Path, version: str
) -> None:
    from cai.attest.sim.devices import DeviceSettings

    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url))
        return httpx.Response(404)

    settings = DeviceSettings(driver_version=version[:60])
    devices = platform.devices(1, settings).collect(NONCE)
    fetched = fetch(answer, devices, anchors)
    assert not any(".." in url or "%" in url or "?" in url for url in seen)
    assert len(fetched.missing) == 5
    with pytest.raises(FormatError):
        Fetched({f"NV_{version}": b""}).save(tmp_path, None)
    assert list(tmp_path.iterdir()) == []


def test_errors_of_the_service(platform: SimulatedPlatform, anchors: TrustAnchors) -> None:
    assert anchors.rim_root is not None

    def asked(handler: Handler, source: GpuSource = SOURCE) -> bytes:
        assert anchors.rim_root is not None
        return fetch_rim(client(handler), source, "NV_X_1.2", root=anchors.rim_root, now=NOW)

    def refused(request: httpx.Request) -> httpx.Response:
        assert request.url.raw_path == b"/v1/rim/NV_X_1.2"
        raise httpx.ConnectError("no")

    with pytest.raises(PeerUnreachable):
        asked(refused)
    with pytest.raises(PeerError, match="404"):
        asked(lambda _: httpx.Response(404))
    with pytest.raises(PeerError, match="302"):
        asked(lambda _: httpx.Response(302, headers={"location": "http://x/"}))
    with pytest.raises(LimitExceeded):
        asked(lambda _: httpx.Response(200, content=b"x" * (MAX_ANSWER + 1)))
    with pytest.raises(PeerError):
        asked(lambda _: httpx.Response(200), GpuSource("not a url"))
