"""``kbs revoke``, ``kbs unrevoke`` and ``kbs lease`` against a broker that runs as a program."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from cai.attest import rcar
from cai.attest.policy import policy_for
from cai.attest.ticket import ChannelView, verify_ticket
from tests.kbs.program import Program, run_kbs
from tests.kbs.release.guests import MODEL_ID, Held, opened, record, request
from tests.kbs.world import RELEASE_REGO, URI, Visitor


class Kbs:
    """The program, a directory, and commands in it."""

    def __init__(self, cwd: Path, anchors: Path) -> None:
        self.cwd = cwd
        self.program = Program(cwd, "--unsafe-simulated-root", anchors)

    def run(self, *arguments: str, status: int = 0) -> str:
        done = run_kbs(*arguments, "--admin-url", self.program.ready["admin"], cwd=self.cwd)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json"))

    def lease(self, visitor: Visitor, **changes: Any) -> tuple[httpx.Response, Held | None]:
        """One whole handshake."""
        base = f"{self.program.ready['listening']}/kbs/v0"
        if not base.startswith("http"):
            base = f"http://{base}"
        with httpx.Client(trust_env=False, timeout=30) as client:
            challenge = client.post(f"{base}/auth", content=rcar.Request().encode()).json()
            told = client.post(f"{base}/attest", content=visitor.body(challenge["nonce"]))
            assert told.status_code == 200, told.text
            wanted = request(**changes)
            answer = client.post(f"{base}/lease", content=wanted.encode())
        return answer, opened(visitor, wanted, answer) if answer.status_code == 200 else None


@pytest.fixture
def kbs(tmp_path: Path, platform_dir: Path, visitor: Visitor) -> Iterator[Kbs]:
    (tmp_path / "record").write_bytes(record())
    (tmp_path / "policy.toml").write_bytes(policy_for(visitor.facts()))
    made = Kbs(tmp_path, platform_dir / "anchors")
    made.run("resource", "set", f"kbs:///{URI}", "record")
    made.run("policy", "set", str(RELEASE_REGO))
    made.run("policy", "set-verification", "policy.toml")
    yield made
    made.program.stop()
    made.program.close()


def test_a_lease_from_grant_to_revocation_and_back(kbs: Kbs, visitor: Visitor) -> None:
    answer, held = kbs.lease(visitor)
    assert held is not None, answer.text
    (listed,) = kbs.json("lease", "list")["leases"]
    assert (listed["id"], listed["state"]) == (held.grant.lease, "living")
    assert held.grant.lease[:12] in kbs.run("lease", "list")

    (key,) = kbs.json("lease", "key")["keys"]
    assert kbs.run("lease", "key").strip() == key["key"]
    verdict, ticket = verify_ticket(
        held.answer.ticket, keys=[bytes.fromhex(key["key"])], view=ChannelView(), simulated=True,
        now=datetime.now(UTC),
    )  # fmt: skip
    assert ticket is not None, verdict.failures

    told = kbs.run("revoke", "--model", MODEL_ID, "--reason", "weights leaked")
    assert "1 living leases end by" in told
    refused, _ = kbs.lease(visitor, renews=held.grant.lease)
    assert (refused.status_code, refused.json()["code"]) == (403, "revoked.model")
    assert "weights leaked" in refused.json()["detail"]
    assert kbs.json("lease", "list")["leases"][0]["revoked_by"] == [f"model/{MODEL_ID}"]
    assert [item["reason"] for item in kbs.json("revoke", "--list")["blocks"]] == ["weights leaked"]
    assert "weights leaked" in kbs.run("revoke", "--list")

    kbs.run("unrevoke", "--model", MODEL_ID, "--reason", "false alarm")
    _, again = kbs.lease(visitor, renews=held.grant.lease)
    assert again is not None
    assert again.grant.lease == held.grant.lease
    assert kbs.json("revoke", "--list")["blocks"] == []

    # What is wrong with a command is said before anything is sent.
    for arguments in (
        ["revoke"], ["revoke", "--model", MODEL_ID, "--owner", "ab" * 32],
        ["revoke", "--list", "--model", MODEL_ID], ["unrevoke"],
    ):
        kbs.run(*arguments, status=2)
    kbs.run("revoke", "--platform", "xyz", status=3)
    kbs.run("unrevoke", "--launch", "ab" * 48, status=3)
    actions = [row["action"] for row in kbs.json("audit", "show")["rows"]]
    mine = [item for item in actions if item.startswith(("block", "release", "renewal"))]
    assert mine == ["release", "block.set", "renewal", "block.lift", "renewal"]
