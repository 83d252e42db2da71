"""Where changes need two persons, one may still revoke, and none alone may lift."""

from __future__ import annotations

from kbs.admin.settings import AdminSettings, TwoPerson
from tests.kbs.admin.crew import first, hire, switch
from tests.kbs.release.guests import MODEL_ID, ask, lease, refused, renew, request
from tests.kbs.world import Site, Visitor

PATH = f"block/model/{MODEL_ID}"


def test_one_person_revokes_and_two_lift(leasing: Site, visitor: Visitor) -> None:
    chief, alice = first(leasing), hire(leasing, "alice", "resource")
    carol = hire(leasing, "carol", "admin")
    held = lease(leasing, visitor)
    switch(leasing, AdminSettings(two_person=TwoPerson()))

    assert alice.call("POST", PATH, {"reason": "stolen"}).status_code == 200
    _, cookie = visitor.attested(leasing)
    refused(ask(leasing, cookie, request(renews=held.grant.lease)), 403, "revoked.model")

    # Lifting needs the role, and then two of those who have it.
    assert alice.call("DELETE", PATH).status_code == 403
    proposed = chief.call("DELETE", PATH)
    assert proposed.status_code == 202, proposed.text
    assert chief.sign(proposed.json()).status_code == 200
    refused(ask(leasing, cookie, request(renews=held.grant.lease)), 403, "revoked.model")
    assert carol.sign(proposed.json()).json()["applied"] is True
    assert renew(leasing, visitor, held).grant.lease == held.grant.lease


def test_a_second_revocation_voids_the_lifting_of_the_first(
    leasing: Site, visitor: Visitor
) -> None:
    chief, carol = first(leasing), hire(leasing, "carol", "admin")
    switch(leasing, AdminSettings(two_person=TwoPerson()))
    assert chief.call("POST", PATH, {"reason": "one"}).status_code == 200
    shown = chief.call("DELETE", PATH).json()
    assert chief.sign(shown).status_code == 200
    assert carol.call("POST", PATH, {"reason": "two"}).status_code == 200
    assert carol.sign(shown).status_code != 200
    _, cookie = visitor.attested(leasing)
    refused(ask(leasing, cookie, request()), 403, "revoked.model")
