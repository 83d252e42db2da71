"""Policies and reference values on PostgreSQL: what one replica sets, the other one decides by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from cai.attest.jwk import b64u_encode
from kbs.server.service import ServeSettings, open_broker
from tests.kbs.postgres import Cluster
from tests.kbs.world import URI, Clock, Site, Visitor

DENY = b"package policy\ndefault allow := false\n"
ASK = (
    b"package policy\nimport rego.v1\ndefault allow := false\n"
    b'allow if query_reference_value("open") == true\n'
)


@pytest.fixture
def database(postgres: Cluster) -> str:
    return postgres.create()


@pytest.fixture
def replicas(
    postgres: Cluster, database: str, tmp_path: Path, platform_dir: Path, clock: Clock
) -> Iterator[tuple[Site, Site]]:
    settings = ServeSettings(
        tmp_path / "kbs-data", "127.0.0.1:0", "127.0.0.1:0",
        unsafe_simulated_root=platform_dir / "anchors", database=postgres.settings(database),
    )
    kek = tmp_path / "kbs-data-kek" / "kek"
    second = replace(settings, data=tmp_path / "second-data", kek=kek)
    with (
        closing(open_broker(settings, clock=clock)) as one,
        closing(open_broker(second, clock=clock)) as two,
    ):
        yield Site(one, settings, clock), Site(two, settings, clock)


def put(site: Site, name: str, text: bytes) -> None:
    answer = site.admin("POST", f"policy/{name}", {"policy": b64u_encode(text)})
    assert answer.status_code == 200, answer.text


def test_both_replicas_decide_by_the_same(
    replicas: tuple[Site, Site], visitor: Visitor, postgres: Cluster, database: str
) -> None:
    one, two = replicas
    one.allow(visitor)
    _, cookie = visitor.attested(one)
    assert two.get(cookie).status_code == 200
    put(one, "resource/models", DENY)
    assert two.get(cookie).status_code == 403
    put(two, f"resource/{URI}", ASK)
    assert one.get(cookie).status_code == 403
    # Each has looked for reference values before; the other one's change is seen all the same.
    values = {"values": {"open": True}, "expires": None}
    assert two.admin("POST", "reference-values", values).status_code == 200
    assert one.get(cookie).status_code == 200
    assert one.admin("DELETE", "reference-value/open").status_code == 200
    assert two.get(cookie).status_code == 403
    listed = two.admin("GET", "policies").json()["policies"]
    assert [item["policy"] for item in listed] == [
        "resource/", "resource/models", f"resource/{URI}", "verification/default",
    ]  # fmt: skip
    notes = one.admin("GET", f"policy-versions/resource/{URI}").json()["versions"]
    assert [note["version"] for note in notes] == [1]
    postgres.run("DELETE FROM reference", database=database)
    for site in replicas:
        answer = site.get(cookie)
        assert answer.status_code == 500
        assert "reference/values/" in answer.json()["detail"]
