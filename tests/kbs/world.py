"""A key broker in the simulated realm, guests that attest to it, and an administrator."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cai import jcs
from cai.attest import jwe, rcar
from cai.attest.anchors import simulated_anchors
from cai.attest.evidence import DeviceEvidence, Evidence
from cai.attest.facts import Facts
from cai.attest.jwk import b64u_encode
from cai.attest.policy import policy_for
from cai.attest.statement import ReleaseStatement, stock_report_data
from cai.attest.tdx.collateral import load_collateral
from cai.attest.verify import verify_evidence
from kbs.admin.tokens import make_admin_token
from kbs.audit.log import read_leaves
from kbs.instance import read_admin_key
from kbs.release.broker import KeyBroker
from kbs.server.config import ServeSettings
from kbs.server.crew import Crew
from kbs.server.surfaces import surfaces

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform

URI = "models/minilm/key"
SECRET_TEXT = b"planted-resource-7f3a"
FACTS = {
    "profile": "sealed", "launched_by": "launcher", "cc_feature": "on", "devtools": "off",
    "multi_gpu_mode": "none", "count": "1", "driver": "580.95.05",
}
STATEMENT = ReleaseStatement("ab" * 48, FACTS, "0.1.0")
RELEASE_REGO = Path(__file__).parents[2] / "kbs" / "policy" / "templates" / "release.rego"


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


@dataclass
class Site:
    """One key broker and both of its listeners, without sockets."""

    broker: KeyBroker
    settings: ServeSettings
    clock: Clock
    cookie: str | None = None
    apps: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        served = surfaces(self.broker, self.settings, Crew(self.settings.limits))
        self.apps = {"main": served.main, "admin": served.admin}

    @property
    def admin_key(self) -> Ed25519PrivateKey:
        return read_admin_key(self.settings.data / "admin.key")

    def call(
        self, method: str, path: str, body: Any = None, *, app: str = "main",
        headers: dict[str, str] | None = None, cookie: str | None = None,
    ) -> httpx.Response:
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = dict(headers or {})
        if cookie is not None:
            sent["Cookie"] = f"kbs-session-id={cookie}"

        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.apps[app], raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://kbs.test") as client:
                return await client.request(method, path, content=content, headers=sent)

        return asyncio.run(run())

    def admin(self, method: str, route: str, body: Any = None) -> httpx.Response:
        token = make_admin_token(self.admin_key, now=self.clock())
        return self.call(
            method, f"/kbs/v0/{route}", body, app="admin",
            headers={"Authorization": f"Bearer {token}"},
        )

    def set_policy(self, route: str, text: bytes) -> httpx.Response:
        return self.admin("POST", route, {"policy": b64u_encode(text)})

    def auth(self, version: str = "0.4.0") -> tuple[str, str]:
        answer = self.call(
            "POST", "/kbs/v0/auth", {"version": version, "tee": "tdx", "extra-params": {}}
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["extra-params"] == ""
        return answer.json()["nonce"], answer.cookies["kbs-session-id"]

    def attest(self, cookie: str, body: bytes) -> httpx.Response:
        return self.call("POST", "/kbs/v0/attest", body, cookie=cookie)

    def get(self, cookie: str | None, path: str = URI, **more: Any) -> httpx.Response:
        return self.call("GET", f"/kbs/v0/resource/{path}", cookie=cookie, **more)

    def audit(self) -> list[dict[str, Any]]:
        _, leaves = read_leaves(self.broker.core.database, start=0, limit=1000)
        return [jcs.parse_canonical(leaf, what="leaf", limit=1 << 20) for leaf in leaves]

    def last(self, action: str) -> dict[str, Any]:
        return [row for row in self.audit() if row["action"] == action][-1]

    def allow(self, visitor: Visitor) -> None:
        """Store the resource and policies that name exactly this visitor's guest."""
        assert self.admin("POST", f"resource/{URI}", SECRET_TEXT).status_code == 200
        assert self.set_policy("resource-policy", RELEASE_REGO.read_bytes()).status_code == 200
        text = policy_for(visitor.facts())
        assert self.set_policy("verification-policy", text).status_code == 200


@dataclass
class Visitor:
    """A guest that attests: every step can be bent."""

    platform: SimulatedPlatform
    image: str = "demo"
    debug: bool = False
    gpus: int = 1
    statement: ReleaseStatement | None = STATEMENT
    key: rcar.TeeKey = field(default_factory=rcar.TeeKey.generate)
    bend_devices: Callable[[tuple[DeviceEvidence, ...]], tuple[DeviceEvidence, ...]] | None = None

    def but(self, **changes: Any) -> Visitor:
        return replace(self, **changes)

    def body(self, nonce: str, *, additional: str | None = None, sent: str | None = None) -> bytes:
        """An attestation; ``sent`` replaces the additional evidence after it was bound."""
        from cai.attest.sim import GuestSettings

        guest = self.platform.guest(GuestSettings(image=self.image, debug=self.debug))
        gpu_nonce = rcar.device_digest(nonce, self.key.jwk)[:32]
        devices = self.platform.devices(self.gpus).collect(gpu_nonce)
        if self.bend_devices is not None:
            devices = self.bend_devices(devices)
        if additional is None:
            additional = rcar.additional_evidence(devices, self.statement)
        quote = guest.quote(
            stock_report_data(rcar.primary_digest(nonce, self.key.jwk, additional))
        )
        return rcar.Attestation(
            nonce, self.key.jwk, rcar.encode_tdx_evidence(quote, None),
            additional if sent is None else sent,
        ).encode()

    def attested(self, site: Site) -> tuple[httpx.Response, str]:
        nonce, cookie = site.auth()
        answer = site.attest(cookie, self.body(nonce))
        assert answer.status_code == 200, answer.text
        return answer, cookie

    def open(self, answer: httpx.Response) -> bytes:
        assert answer.status_code == 200, answer.text
        return jwe.decrypt(answer.content, self.key).reveal()

    def facts(self) -> Facts:
        """What any verifier establishes about this guest."""
        from cai.attest.sim import GuestSettings

        report_data, gpu_nonce = bytes(range(64)), bytes(range(32))
        guest = self.platform.guest(GuestSettings(image=self.image, debug=self.debug))
        verdict, facts = verify_evidence(
            Evidence(guest.quote(report_data), self.platform.devices(self.gpus).collect(gpu_nonce)),
            subject="test",
            report_data=report_data,
            gpu_nonce=gpu_nonce,
            anchors=simulated_anchors(self.platform.anchors),
            collateral=load_collateral(self.platform.anchors / "collateral"),
            now=datetime.now(UTC),
        )
        verdict.require()
        assert facts is not None
        return facts if self.statement is None else facts.with_statement(self.statement)
