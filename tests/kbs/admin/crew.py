"""Several administrators of one broker, each with a key of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kbs.admin.app import admin_app
from kbs.admin.proposal_form import Proposal
from kbs.admin.settings import AdminSettings
from kbs.admin.tokens import make_admin_token
from tests.kbs.world import Site


@dataclass
class Person:
    """An administrator and their key."""

    site: Site
    name: str
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    @property
    def public(self) -> str:
        return self.key.public_key().public_bytes_raw().hex()

    def call(self, method: str, route: str, body: Any = None, **token: Any) -> httpx.Response:
        bearer = make_admin_token(self.key, now=self.site.clock(), **token)
        return self.site.call(
            method, f"/kbs/v0/{route}", body, app="admin",
            headers={"Authorization": f"Bearer {bearer}"},
        )  # fmt: skip

    def sign(self, shown: dict[str, Any], **changes: Any) -> httpx.Response:
        """Approve a proposal, or one that reads differently."""
        value = {**shown["proposal"], **changes}
        signature = Proposal.from_json(value).sign(self.key)
        return self.call("POST", f"proposal/{shown['id']}/approve", {"signature": signature})


def hire(site: Site, name: str, *roles: str, by: Person | None = None, **more: Any) -> Person:
    """Add an administrator; by the first one unless told otherwise."""
    person = Person(site, name)
    record = {"key": person.public, "roles": list(roles), **more}
    boss = by or first(site)
    answer = boss.call("POST", f"admin/{name}", record)
    assert answer.status_code == 200, answer.text
    return person


def first(site: Site) -> Person:
    """The administrator whose key came with the database."""
    return Person(site, "admin", site.admin_key)


def switch(site: Site, settings: AdminSettings) -> None:
    """Start the admin listener again with other settings."""
    site.apps["admin"] = admin_app(site.broker, settings)
