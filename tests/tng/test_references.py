"""GPU reference files and revocation answers at the gateway's own verification."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cai import merkle
from cai.attest.verdict import Verdict
from cai.errors import InputMissing
from tests.tng.gateways import FakeAgent, World
from tng.config.entries import parse
from tng.config.trust import BuiltinVerify
from tng.peers.judge import BuiltinJudge
from tng.peers.references import References

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform

LEAF = b"\x01" + bytes(69)


@pytest.fixture(scope="module")
def references(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``rims`` and ``ocsp`` of the world's vendor, and a policy that demands both."""
    from cai.attest.sim import SimulatedPlatform

    platform: SimulatedPlatform = SimulatedPlatform.load(world.directory / "platform")
    directory = tmp_path_factory.mktemp("references")
    for name in ("rims", "ocsp"):
        (directory / name).mkdir()
    for name, data in platform.rims().items():
        (directory / "rims" / f"{name}.swidtag").write_bytes(data)
    responder = platform.responder()
    for serial, (certificate, _) in responder.links.items():
        answer = responder.about(certificate, now=datetime.now(UTC))
        (directory / "ocsp" / f"{serial:x}.ocsp").write_bytes(answer)
    lines = world.policy.read_text().splitlines()
    kept = [line for line in lines if "unsafe_without_" not in line]
    assert len(kept) == len(lines) - 2
    (directory / "policy.toml").write_text("\n".join(kept))
    return directory


def verify_settings(world: World, references: Path, **more: object) -> BuiltinVerify:
    verify = world.verify(policy=str(references / "policy.toml"), **more)
    value = {
        "add_ingress": [
            {"http_proxy": {"proxy_listen": {"host": "127.0.0.1", "port": 0}}, "verify": verify}
        ]
    }
    (entry,) = parse(value, where="c").ingress
    assert isinstance(entry.trust.verify, BuiltinVerify)
    return entry.trust.verify


def judged(world: World, agent: FakeAgent, settings: BuiltinVerify) -> Verdict:
    evidence = agent.evidence([merkle.leaf_hash(LEAF)])
    return BuiltinJudge(settings, References.load(settings))._verify(LEAF, evidence, "peer")


def failures(verdict: Verdict) -> set[str]:
    return {item.name for item in verdict.failures}


def test_both_are_there(world: World, agent: FakeAgent, references: Path) -> None:
    more = {name: str(references / name) for name in ("rims", "ocsp")}
    verdict = judged(world, agent, verify_settings(world, references, **more))
    assert failures(verdict) == set()
    assert not any("unsafe_without" in name for name in verdict.unsafe)


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ((), {"gpu.0.rim_compared", "gpu.0.ocsp_age"}),
        (("rims",), {"gpu.0.ocsp_age"}),
        (("ocsp",), {"gpu.0.rim_compared"}),
    ],
)
def test_one_is_missing(
    world: World, agent: FakeAgent, references: Path, given: tuple[str, ...], missing: set[str]
) -> None:
    more = {name: str(references / name) for name in given}
    verdict = judged(world, agent, verify_settings(world, references, **more))
    assert failures(verdict) == missing


def test_directories_that_are_not_there(world: World, references: Path, tmp_path: Path) -> None:
    for name in ("rims", "ocsp"):
        settings = verify_settings(world, references, **{name: str(tmp_path / "none")})
        with pytest.raises(InputMissing):
            References.load(settings)
