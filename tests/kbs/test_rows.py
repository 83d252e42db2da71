"""What an edited, swapped or stolen database cannot do."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cai.attest.anchors import vendor_anchors
from cai.errors import CaiError, InputMissing, SettingError, StorageError, Tampered, WrongKey
from cai.secret import Secret
from kbs.instance import default_kek, open_instance
from kbs.keys.sealing import RowIdentity, Sealer
from kbs.names import Realm
from kbs.server.service import ServeSettings, open_broker
from tests.kbs.world import SECRET_TEXT, URI, Site, Visitor

ME = RowIdentity("a" * 32, "production", "resource", "a/b/c", 1)


def edit(site: Site, *statements: str) -> None:
    with sqlite3.connect(site.settings.data / "kbs.sqlite") as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


# Sealing itself.


def test_a_row_opens_as_itself_only() -> None:
    sealer = Sealer(Secret(bytes(32)))
    sealed = sealer.seal(ME, b"text")
    assert sealer.open(ME, sealed) == b"text"
    others = [
        RowIdentity("b" * 32, ME.realm, ME.table, ME.path, 1),
        RowIdentity(ME.instance, "simulated", ME.table, ME.path, 1),
        RowIdentity(ME.instance, ME.realm, "policy", ME.path, 1),
        RowIdentity(ME.instance, ME.realm, ME.table, "a/b/d", 1),
        RowIdentity(ME.instance, ME.realm, ME.table, ME.path, 2),
        RowIdentity(ME.instance, ME.realm, ME.table, ME.path, 1, "someone"),
    ]
    for other in others:
        with pytest.raises(Tampered):
            sealer.open(other, sealed)
    with pytest.raises(Tampered):
        Sealer(Secret(b"\x01" * 32)).open(ME, sealed)


def test_every_byte_of_a_row_is_authenticated() -> None:
    sealer = Sealer(Secret(bytes(32)))
    sealed = sealer.seal(ME, b"text")
    for place in range(len(sealed)):
        bent = bytearray(sealed)
        bent[place] ^= 1
        with pytest.raises(Tampered):
            sealer.open(ME, bytes(bent))
    for length in (0, 1, 31, 47, len(sealed) - 1):
        with pytest.raises(Tampered):
            sealer.open(ME, sealed[:length])


def test_equal_contents_are_sealed_differently() -> None:
    sealer = Sealer(Secret(bytes(32)))
    assert sealer.seal(ME, b"text") != sealer.seal(ME, b"text")


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_other_key_sizes_are_refused(size: int) -> None:
    with pytest.raises(CaiError):
        Sealer(Secret(bytes(size)))


# A database that was edited.


def denied(site: Site, visitor: Visitor) -> str:
    _, cookie = visitor.attested(site)
    answer = site.get(cookie)
    assert answer.status_code == 500, answer.text
    assert site.last("release")["decision"] == "deny"
    detail: str = answer.json()["detail"]
    return detail


def test_no_plaintext_is_in_the_database(allowed: Site, visitor: Visitor) -> None:
    answer, cookie = visitor.attested(allowed)
    visitor.open(allowed.get(cookie))
    stored = b"".join(path.read_bytes() for path in allowed.settings.data.glob("kbs.sqlite*"))
    for secret in (SECRET_TEXT, cookie.encode(), answer.json()["token"].encode()):
        assert secret not in stored


def test_resources_that_were_swapped_are_detected(allowed: Site, visitor: Visitor) -> None:
    assert allowed.admin("POST", "resource/others/cheap/key", b"cheap").status_code == 200
    edit(
        allowed,
        f"UPDATE resource SET path = 'x' WHERE path = '{URI}'",
        f"UPDATE resource SET path = '{URI}' WHERE path = 'others/cheap/key'",
    )
    assert "not the one in the audit log" in denied(allowed, visitor)


def test_swapped_contents_are_detected(allowed: Site, visitor: Visitor) -> None:
    assert allowed.admin("POST", "resource/others/cheap/key", b"cheap").status_code == 200
    edit(
        allowed,
        "UPDATE resource SET sealed = (SELECT sealed FROM resource WHERE "
        f"path = 'others/cheap/key') WHERE path = '{URI}'",
    )
    denied(allowed, visitor)


def test_an_old_version_put_back_is_detected(allowed: Site, visitor: Visitor) -> None:
    edit(allowed, "CREATE TABLE kept AS SELECT * FROM resource")
    assert allowed.admin("POST", f"resource/{URI}", b"second").status_code == 200
    edit(allowed, "DELETE FROM resource", "INSERT INTO resource SELECT * FROM kept")
    denied(allowed, visitor)


def test_an_old_policy_put_back_is_detected(allowed: Site, visitor: Visitor) -> None:
    edit(allowed, "CREATE TABLE kept AS SELECT * FROM policy")
    allowed.set_policy("resource-policy", b"package policy\ndefault allow := false\n")
    edit(allowed, "DELETE FROM policy", "INSERT INTO policy SELECT * FROM kept")
    denied(allowed, visitor)


def test_a_deleted_row_is_detected(allowed: Site, visitor: Visitor) -> None:
    edit(allowed, f"DELETE FROM resource WHERE path = '{URI}'")
    assert "gone" in denied(allowed, visitor)


def test_a_deleted_policy_is_detected(allowed: Site, visitor: Visitor) -> None:
    edit(allowed, "DELETE FROM policy WHERE path = 'verification/default'")
    denied(allowed, visitor)


def test_an_invented_row_is_detected(allowed: Site, visitor: Visitor) -> None:
    edit(
        allowed,
        "CREATE TABLE one AS SELECT * FROM resource",
        "UPDATE one SET path = 'models/minilm/new'",
        "INSERT INTO resource SELECT * FROM one",
    )
    _, cookie = visitor.attested(allowed)
    assert allowed.get(cookie, "models/minilm/new").status_code == 500


def test_facts_given_to_another_session_are_detected(allowed: Site, visitor: Visitor) -> None:
    _, good = visitor.attested(allowed)
    _, cookie = visitor.but(image="other").attested(allowed)
    from kbs.protocol.sessions import session_ref

    edit(
        allowed,
        f"UPDATE session SET sealed = (SELECT sealed FROM session WHERE "
        f"ref = '{session_ref(good)}') WHERE ref = '{session_ref(cookie)}'",
    )
    assert allowed.get(cookie).status_code == 500


def test_a_prolonged_session_is_detected(allowed: Site, visitor: Visitor) -> None:
    _, cookie = visitor.attested(allowed)
    edit(allowed, "UPDATE session SET expires = expires + 100000")
    assert allowed.get(cookie).status_code == 500


def test_a_session_set_to_attested_by_hand_gets_nothing(allowed: Site) -> None:
    _, cookie = allowed.auth()
    edit(allowed, "UPDATE session SET state = 'attested'")
    assert allowed.get(cookie).status_code == 401


def test_without_an_audit_head_nothing_is_released(allowed: Site, visitor: Visitor) -> None:
    _, cookie = visitor.attested(allowed)
    edit(allowed, "DELETE FROM audit_head")
    assert allowed.get(cookie).status_code == 500


def test_a_decision_that_cannot_be_logged_is_refused(allowed: Site, visitor: Visitor) -> None:
    _, cookie = visitor.attested(allowed)
    edit(
        allowed,
        "CREATE TRIGGER full BEFORE INSERT ON audit BEGIN SELECT RAISE(FAIL, 'no'); END",
    )
    answer = allowed.get(cookie)
    assert answer.status_code == 500
    assert "ciphertext" not in answer.text
    refused = allowed.admin("POST", f"resource/{URI}", b"new")
    assert refused.status_code == 500
    edit(allowed, "DROP TRIGGER full")
    assert visitor.open(allowed.get(cookie)) == SECRET_TEXT


def test_the_log_has_no_gaps(allowed: Site, visitor: Visitor) -> None:
    visitor.attested(allowed)
    rows = allowed.audit()
    assert [row["seq"] for row in rows] == list(range(len(rows)))
    assert {row["instance"] for row in rows} == {allowed.broker.instance.id}


# Opening.


def reopen(site: Site, **changes: object) -> None:
    site.broker.close()
    settings = ServeSettings(
        **{name: getattr(site.settings, name) for name in site.settings.__slots__} | changes  # type: ignore[arg-type]
    )
    open_broker(settings).close()


def test_a_broker_reopens_with_everything(allowed: Site, visitor: Visitor) -> None:
    _, cookie = visitor.attested(allowed)
    allowed.broker.close()
    again = Site(open_broker(allowed.settings, clock=allowed.clock), allowed.settings,
                 allowed.clock)  # fmt: skip
    assert visitor.open(again.get(cookie)) == SECRET_TEXT
    again.broker.close()


def test_a_simulated_database_is_no_production_database(site: Site) -> None:
    with pytest.raises(SettingError, match="simulated realm"):
        reopen(site, unsafe_simulated_root=None)


def test_a_production_database_refuses_a_simulated_root(tmp_path: Path, platform_dir: Path) -> None:
    settings = ServeSettings(tmp_path / "prod", "127.0.0.1:0", "127.0.0.1:0")
    broker = open_broker(settings)
    assert broker.instance.realm is Realm.PRODUCTION
    assert broker.unsafe == ()
    broker.close()
    with pytest.raises(SettingError, match="production"):
        open_broker(
            ServeSettings(tmp_path / "prod", "127.0.0.1:0", "127.0.0.1:0",
                          unsafe_simulated_root=platform_dir / "anchors")
        )  # fmt: skip


def test_a_realm_relabelled_in_the_database_does_not_open(site: Site) -> None:
    edit(site, "UPDATE instance SET realm = 'production'")
    with pytest.raises(WrongKey):
        reopen(site, unsafe_simulated_root=None)


def test_simulated_evidence_never_verifies_under_vendor_roots(
    site: Site, visitor: Visitor
) -> None:
    site.broker._anchors = vendor_anchors()
    nonce, cookie = site.auth()
    answer = site.attest(cookie, visitor.body(nonce))
    assert answer.status_code == 403
    names = {item["name"] for item in site.last("attest")["checks"] if item["outcome"] == "fail"}
    assert "kbs.realm" in names
    assert len(names) > 1


def test_first_start_makes_private_files(site: Site) -> None:
    data, kek = site.settings.data, default_kek(site.settings.data)
    assert data.stat().st_mode & 0o777 == 0o700
    assert kek.parent.stat().st_mode & 0o777 == 0o700
    assert kek.stat().st_mode & 0o777 == 0o400
    for name in ("admin.key", "kbs.sqlite", "kbs.sqlite-wal"):
        assert (data / name).stat().st_mode & 0o777 == 0o600, name
    assert kek.read_text().strip() not in "".join(
        path.read_text("latin-1") for path in data.iterdir()
    )


def test_a_key_inside_the_data_directory_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for kek in (data / "kek", data / "deep" / "kek", tmp_path / "x" / ".." / "data" / "kek"):
        with pytest.raises(SettingError, match="inside the data directory"):
            open_instance(data, kek, Realm.PRODUCTION, now=datetime.now(UTC))
    (tmp_path / "link").symlink_to(data)
    with pytest.raises(SettingError):
        open_instance(data, tmp_path / "link" / "kek", Realm.PRODUCTION, now=datetime.now(UTC))


def change_kek(change: Callable[[Path], None], site: Site) -> None:
    kek = default_kek(site.settings.data)
    kek.chmod(0o600)
    change(kek)


def test_another_key_does_not_open_the_database(site: Site) -> None:
    change_kek(lambda kek: kek.write_text("ab" * 32 + "\n"), site)
    with pytest.raises(WrongKey):
        reopen(site)


def test_a_missing_key_is_named(site: Site) -> None:
    change_kek(Path.unlink, site)
    with pytest.raises(InputMissing, match="key encryption key"):
        reopen(site)
    assert not default_kek(site.settings.data).exists()


@pytest.mark.parametrize("text", ["", "ab", "AB" * 32, "zz" * 32, "ab" * 33])
def test_a_key_of_another_form_is_refused(site: Site, text: str) -> None:
    change_kek(lambda kek: kek.write_text(text), site)
    with pytest.raises(CaiError):
        reopen(site)


def test_open_permissions_are_refused(site: Site) -> None:
    default_kek(site.settings.data).chmod(0o444)
    with pytest.raises(StorageError, match="readable by others"):
        reopen(site)
    default_kek(site.settings.data).chmod(0o400)
    site.settings.data.chmod(0o755)
    with pytest.raises(StorageError, match="open to others"):
        reopen(site)


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("x")
    with pytest.raises(CaiError):
        open_broker(ServeSettings(tmp_path / "data", "127.0.0.1:0", "127.0.0.1:0"))


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o700)
    (tmp_path / "data" / "kbs.sqlite").write_bytes(b"rubbish " * 1000)
    with pytest.raises(CaiError, match="not a database"):
        open_broker(ServeSettings(tmp_path / "data", "127.0.0.1:0", "127.0.0.1:0"))


def test_a_schema_of_another_version_is_refused(site: Site) -> None:
    edit(site, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(CaiError, match="schema 9999"):
        reopen(site)


def test_leaves_are_canonical_and_versioned(site: Site) -> None:
    row = site.audit()[0]
    assert row["cai-audit"] == 1
    assert row["action"] == "instance.create"
    assert json.dumps(row)
