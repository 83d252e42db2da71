"""GPU reference files and revocation answers at the key broker: given, demanded, missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cai.attest.policy import policy_for
from cai.errors import InputMissing
from kbs.server.service import open_broker
from tests.kbs.world import RELEASE_REGO, SECRET_TEXT, URI, Clock, Site, Visitor

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform

Open = Callable[..., Site]


@pytest.fixture
def rims(platform: SimulatedPlatform, tmp_path: Path) -> Path:
    directory = tmp_path / "rims"
    directory.mkdir()
    for name, data in platform.rims().items():
        (directory / f"{name}.xml").write_bytes(data)
    return directory


@pytest.fixture
def ocsp(platform: SimulatedPlatform, tmp_path: Path) -> Path:
    return write_answers(platform, tmp_path / "ocsp")


def write_answers(platform: SimulatedPlatform, directory: Path, **settings: Any) -> Path:
    from cai.attest.sim.revocation import OcspSettings

    directory.mkdir(exist_ok=True)
    responder = platform.responder(OcspSettings(**settings))
    for serial, (certificate, _) in responder.links.items():
        answer = responder.about(certificate, now=datetime.now(UTC))
        (directory / f"{serial:x}.der").write_bytes(answer)
    return directory


@pytest.fixture
def opened(site: Site, visitor: Visitor, clock: Clock, tmp_path: Path) -> Iterator[Open]:
    """A broker with these directories, whose policy demands both of them."""
    with ExitStack() as stack:

        def open_with(**directories: Path) -> Site:
            settings = replace(site.settings, data=tmp_path / "strict-data", **directories)
            broker = open_broker(settings, clock=clock)
            stack.callback(broker.close)
            strict = Site(broker, settings, clock)
            assert strict.admin("POST", f"resource/{URI}", SECRET_TEXT).status_code == 200
            release = RELEASE_REGO.read_bytes()
            assert strict.set_policy("resource-policy", release).status_code == 200
            text = policy_for(visitor.facts()).decode()
            assert "unsafe_without_rim = true" in text
            assert "unsafe_without_ocsp = true" in text
            kept = [line for line in text.splitlines() if "unsafe_without_" not in line]
            policy = "\n".join(kept).encode()
            assert strict.set_policy("verification-policy", policy).status_code == 200
            return strict

        yield open_with


def test_both_are_there(opened: Open, visitor: Visitor, rims: Path, ocsp: Path) -> None:
    site = opened(rims=rims, ocsp=ocsp)
    _, cookie = visitor.attested(site)
    assert visitor.open(site.get(cookie)) == SECRET_TEXT
    checks = {item["name"]: item["outcome"] for item in site.last("release")["checks"]}
    assert checks["gpu.0.rim_compared"] == checks["gpu.0.ocsp_age"] == "pass"


@pytest.mark.parametrize("given", [(), ("rims",), ("ocsp",)])
def test_one_is_missing(
    opened: Open, visitor: Visitor, rims: Path, ocsp: Path, given: tuple[str, ...]
) -> None:
    directories = {"rims": rims, "ocsp": ocsp}
    site = opened(**{name: directories[name] for name in given})
    _, cookie = visitor.attested(site)
    assert site.get(cookie).status_code == 403


def test_a_file_is_missing(opened: Open, visitor: Visitor, rims: Path, ocsp: Path) -> None:
    for path in rims.glob("NV_GPU_DRIVER_*"):
        path.unlink()
    site = opened(rims=rims, ocsp=ocsp)
    _, cookie = visitor.attested(site)
    assert site.get(cookie).status_code == 403


def test_a_revoked_part_ends_at_attestation(
    opened: Open, visitor: Visitor, platform: SimulatedPlatform, rims: Path, tmp_path: Path
) -> None:
    status = {"NVIDIA GH100 Provisioner ICA 1": "revoked"}
    site = opened(rims=rims, ocsp=write_answers(platform, tmp_path / "revoked", status=status))
    nonce, cookie = site.auth()
    assert site.attest(cookie, visitor.body(nonce)).status_code == 403
    assert site.get(cookie).status_code in (401, 403)


def test_answers_grow_old(
    opened: Open, visitor: Visitor, platform: SimulatedPlatform, rims: Path, tmp_path: Path,
    clock: Clock,
) -> None:  # fmt: skip
    answers = write_answers(platform, tmp_path / "ocsp", lifetime=timedelta(days=20))
    site = opened(rims=rims, ocsp=answers)
    clock.ahead = timedelta(hours=25)
    _, cookie = visitor.attested(site)
    assert site.get(cookie).status_code == 403


def test_a_directory_that_is_not_there(opened: Open, tmp_path: Path) -> None:
    for name in ("rims", "ocsp"):
        with pytest.raises(InputMissing):
            opened(**{name: tmp_path / "none"})
