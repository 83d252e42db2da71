"""Rotation: from every provider to every other, while guests go on; nothing is ever lost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cai import jcs
from cai.errors import CaiError, StorageError, Tampered, Unavailable, WrongKey
from cai.secret import Secret
from kbs.instance import default_kek
from kbs.keys.file_provider import FileProvider
from kbs.keys.keyring import Keyring
from kbs.keys.provider import KeyProvider
from kbs.keys.settings import FileSettings, KeySettings, PassphraseSettings, Pkcs11Settings
from kbs.keys.signing import OVERLAP_SECONDS, KeyName
from kbs.resources.rotation import Rotation, wrapping_counts
from kbs.resources.store import Stale
from kbs.server.service import ServeSettings, open_broker
from tests.kbs.keys.conftest import Token, secret_file, secret_input
from tests.kbs.keys.test_providers import transit
from tests.kbs.keys.vault_simulator import VaultSimulator, errors
from tests.kbs.world import SECRET_TEXT, URI, Clock, Site, Visitor


class Described:
    """A provider that a test has ready, as settings describe one."""

    unsafe: tuple[str, ...] = ()

    def __init__(self, provider: KeyProvider) -> None:
        self.provider = provider

    def open(self, name: str, *, data: Path, create: bool) -> KeyProvider:
        return self.provider


class Lying:
    """A provider that wraps well and gives back another key."""

    id = "lying:1"

    def __init__(self, *, at_wrap: bool) -> None:
        self._inner = FileProvider(Secret(bytes(32)))
        self.at_wrap = at_wrap
        self.lies = at_wrap

    def wrap(self, key: Secret, context: bytes) -> bytes:
        return self._inner.wrap(key, context)

    def unwrap(self, wrapped: bytes, context: bytes) -> Secret:
        key = self._inner.unwrap(wrapped, context)
        return Secret(os.urandom(32)) if self.lies else key

    def close(self) -> None:
        return


Opener = Callable[..., Site]


@pytest.fixture
def reopen(site: Site) -> Iterator[Opener]:
    """Opens the same database again as another replica, with these providers."""
    opened: list[Site] = []

    def another(keys: KeySettings | None = None) -> Site:
        settings = replace(site.settings, keys=keys or KeySettings())
        broker = open_broker(settings, clock=site.clock)
        opened.append(Site(broker, settings, site.clock))
        return opened[-1]

    yield another
    for item in opened:
        item.broker.close()


def keys(provider: str, **described: Any) -> KeySettings:
    return KeySettings(provider, described)


def rotate(site: Site, to: str | None = None) -> Any:
    body = b"" if to is None else jcs.canonical({"to": to})
    return site.admin("POST", "key/rotate", body)


def fill(site: Site) -> None:
    for number in range(4):
        for path in ("a/b/c", "team/x/y"):
            answer = site.admin("POST", f"resource/{path}", b"contents %d" % number)
            assert answer.status_code == 200, answer.text


def everything(site: Site) -> list[bytes]:
    core, found = site.broker.core, []
    for path in ("a/b/c", "team/x/y"):
        for version in range(1, 5):
            with core.database.read() as connection:
                sealed = core.resources.sealed(connection, path, version)
            assert sealed is not None
            found.append(core.resources.open(sealed).contents)
    return found


FILLED = [b"contents %d" % number for number in range(4)] * 2


def test_guests_notice_nothing_and_the_old_key_can_go(
    allowed: Site, visitor: Visitor, reopen: Opener, tmp_path: Path
) -> None:
    fill(allowed)
    _, cookie = visitor.attested(allowed)
    secret_file(tmp_path, "new-kek", "ab" * 32)
    both = keys("new", new=FileSettings(tmp_path / "new-kek"))
    other = reopen(both)
    assert visitor.open(other.get(cookie)) == SECRET_TEXT
    answer = rotate(other)
    assert answer.status_code == 200, answer.text
    assert answer.json()["data_keys"] == 9
    assert answer.json()["generation"] == 2
    # The same session, the same token, on both replicas; the first was never told.
    assert visitor.open(other.get(cookie)) == SECRET_TEXT
    kek = default_kek(allowed.settings.data)
    kek.unlink()
    alone = reopen(both)
    assert visitor.open(alone.get(cookie)) == SECRET_TEXT
    assert everything(alone) == FILLED
    with alone.broker.core.database.read() as connection:
        assert set(wrapping_counts(connection)) == {answer.json()["to"]}


def test_a_replica_that_does_not_know_the_new_provider_says_so(
    allowed: Site, visitor: Visitor, reopen: Opener, tmp_path: Path
) -> None:
    secret_file(tmp_path, "new-kek", "ab" * 32)
    rotate(reopen(keys("new", new=FileSettings(tmp_path / "new-kek"))))
    _, cookie = visitor.attested(allowed)
    answer = allowed.get(cookie)
    assert answer.status_code == 503
    assert "not configured" in answer.json()["detail"]
    assert allowed.admin("POST", f"resource/{URI}", b"x").status_code == 503


@pytest.mark.parametrize("kind", ["passphrase", "pkcs11", "vault-transit"])
def test_to_every_provider_and_back(
    allowed: Site, visitor: Visitor, reopen: Opener, tmp_path: Path, kind: str,
    request: pytest.FixtureRequest,
) -> None:
    described: Any
    match kind:
        case "passphrase":
            words = secret_input(tmp_path, "words", "correct horse battery staple")
            described = PassphraseSettings(words)
        case "pkcs11":
            token: Token = request.getfixturevalue("token")
            described = Pkcs11Settings(token.made())
        case _:
            described = Described(transit(request.getfixturevalue("vault"), tmp_path))
    fill(allowed)
    _, cookie = visitor.attested(allowed)
    site = reopen(keys("there", there=described))
    there = rotate(site).json()
    assert there["to"].startswith(kind)
    assert everything(site) == FILLED
    assert visitor.open(site.get(cookie)) == SECRET_TEXT
    site.admin("POST", f"resource/{URI}", b"stored there")
    assert visitor.open(site.get(cookie)) == b"stored there"
    assert rotate(site, "file").json()["to"].startswith("file:")
    again = reopen()
    assert everything(again) == FILLED
    assert visitor.open(again.get(cookie)) == b"stored there"


def test_a_new_database_starts_under_a_token(
    token: Token, tmp_path: Path, platform_dir: Path, clock: Clock, visitor: Visitor
) -> None:
    described = Pkcs11Settings(token.made())
    settings = ServeSettings(
        tmp_path / "hsm-data", "127.0.0.1:0", "127.0.0.1:0",
        unsafe_simulated_root=platform_dir / "anchors", keys=keys("hsm", hsm=described),
    )
    with closing(open_broker(settings, clock=clock)) as broker:
        site = Site(broker, settings, clock)
        site.allow(visitor)
        _, cookie = visitor.attested(site)
        assert visitor.open(site.get(cookie)) == SECRET_TEXT
    assert not default_kek(settings.data).exists()
    with closing(open_broker(settings, clock=clock)) as broker:
        assert visitor.open(Site(broker, settings, clock).get(cookie)) == SECRET_TEXT
    with pytest.raises(CaiError):
        open_broker(replace(settings, keys=KeySettings()), clock=clock)


def test_rotation_to_the_same_provider_wraps_anew(site: Site) -> None:
    fill(site)
    core = site.broker.core
    with core.database.read() as connection:
        before = core.resources.sealed(connection, "a/b/c")
    assert rotate(site).json()["generation"] == 2
    with core.database.read() as connection:
        after = core.resources.sealed(connection, "a/b/c")
    assert before is not None
    assert after is not None
    assert before.stored is not None
    assert after.stored is not None
    assert before.stored.wrapped != after.stored.wrapped
    assert before.stored.row_hash == after.stored.row_hash
    assert everything(site) == FILLED


# What goes wrong loses nothing.


def test_an_unavailable_target_changes_nothing(
    allowed: Site, visitor: Visitor, reopen: Opener, vault: VaultSimulator, tmp_path: Path
) -> None:
    fill(allowed)
    site = reopen(keys("file", vault=Described(transit(vault, tmp_path))))
    for fault in (errors(503, "sealed"), errors(403, "permission denied")):
        vault.fault = fault
        answer = rotate(site, "vault")
        assert answer.status_code == 503
        assert answer.json()["code"] == "keys-unavailable"
    vault.fault = None
    # It goes away half way.
    provider = site.broker.core.instance.keyring.named("vault")
    count = 0

    def wrap(key: Secret, context: bytes, inner: Any = provider.wrap) -> bytes:
        nonlocal count
        count += 1
        if count > 3:
            raise Unavailable("gone", code="keys-unavailable")
        wrapped: bytes = inner(key, context)
        return wrapped

    provider.wrap = wrap  # type: ignore[method-assign]
    assert rotate(site, "vault").status_code == 503
    assert everything(site) == FILLED
    assert site.last("key.create")
    with site.broker.core.database.read() as connection:
        assert not any(name.startswith("vault") for name in wrapping_counts(connection))


def test_an_unavailable_provider_is_503_and_passes(
    allowed: Site, visitor: Visitor, reopen: Opener, vault: VaultSimulator, tmp_path: Path
) -> None:
    site = reopen(keys("vault", vault=Described(transit(vault, tmp_path))))
    assert rotate(site).status_code == 200
    _, cookie = visitor.attested(site)
    vault.stop()
    answer = site.get(cookie)
    assert answer.status_code == 503
    assert "ciphertext" not in answer.text
    assert site.last("release")["decision"] == "deny"
    assert site.admin("POST", f"resource/{URI}", b"x").status_code == 503
    status = site.admin("GET", "key").json()
    assert next(item["trouble"] for item in status["providers"] if item["name"] == "vault")
    # What needs no key provider still works: attesting, deleting, reading policies.
    visitor.attested(site)
    vault.start()
    assert visitor.open(site.get(cookie)) == SECRET_TEXT


def test_a_target_that_gives_back_another_key_is_refused(
    allowed: Site, reopen: Opener
) -> None:
    fill(allowed)
    site = reopen(keys("file", lying=Described(Lying(at_wrap=True))))
    answer = rotate(site, "lying")
    assert answer.status_code == 500
    assert answer.json()["code"] == "another-key"
    assert everything(site) == FILLED
    status = site.admin("GET", "key").json()
    (told,) = [item for item in status["providers"] if item["name"] == "lying"]
    assert "another key" in told["trouble"]


def test_a_provider_that_turns_to_lying_releases_nothing(
    allowed: Site, visitor: Visitor, reopen: Opener
) -> None:
    provider = Lying(at_wrap=False)
    settings = keys("lying", lying=Described(provider))
    site = reopen(settings)
    assert rotate(site).status_code == 200
    _, cookie = visitor.attested(site)
    assert visitor.open(site.get(cookie)) == SECRET_TEXT
    provider.lies = True
    answer = site.get(cookie)
    assert answer.status_code == 500
    assert "another key" in site.last("release")["reason"]
    with pytest.raises(WrongKey):
        reopen(settings)
    provider.lies = False
    assert visitor.open(site.get(cookie)) == SECRET_TEXT


def test_a_crash_in_the_change_leaves_every_old_wrapping(
    allowed: Site, visitor: Visitor, reopen: Opener, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill(allowed)
    secret_file(tmp_path, "new-kek", "ab" * 32)
    site = reopen(keys("new", new=FileSettings(tmp_path / "new-kek")))

    def crash(*_: object, **__: object) -> None:
        raise StorageError("the power fails")

    monkeypatch.setattr("kbs.resources.rotation.replace_row_key", crash)
    assert rotate(site).status_code == 500
    monkeypatch.undo()
    (tmp_path / "new-kek").unlink()
    assert everything(reopen()) == FILLED
    assert everything(allowed) == FILLED


def test_what_is_stored_meanwhile_is_rotated_too(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(site)
    core = site.broker.core
    prepare, rounds = core.rotation.prepare, 0

    def slow(name: str) -> object:
        nonlocal rounds
        rounds += 1
        made = prepare(name)
        if rounds == 1:
            assert site.admin("POST", "resource/new/one/key", b"meanwhile").status_code == 200
        return made

    monkeypatch.setattr(core.rotation, "prepare", slow)
    assert rotate(site).json()["data_keys"] == 9
    assert rounds == 2
    with core.database.read() as connection:
        sealed = core.resources.sealed(connection, "new/one/key")
    assert sealed is not None
    assert core.resources.open(sealed).contents == b"meanwhile"


def test_two_rotations_at_once_make_one_stale(site: Site) -> None:
    core = site.broker.core
    late = core.rotation.prepare("file")
    assert rotate(site).status_code == 200
    with core.database.decide() as connection, pytest.raises(Stale):
        core.rotation.apply(connection, late)


def test_a_damaged_row_is_named_and_nothing_is_rotated(site: Site, tmp_path: Path) -> None:
    import sqlite3

    fill(site)
    with closing(sqlite3.connect(site.settings.data / "kbs.sqlite")) as connection, connection:
        connection.execute(
            "UPDATE resource SET wrapped = zeroblob(112) WHERE path = 'a/b/c' AND version = 2"
        )
    answer = rotate(site)
    assert answer.status_code == 500
    assert "resource/a/b/c version 2" in answer.json()["detail"]
    assert site.admin("POST", "resource-purge/a/b/c", jcs.canonical({"upto": 2})).status_code == 200
    assert rotate(site).status_code == 200


@pytest.mark.parametrize("body", [b"x", b"[]", b'{"to":1}', b'{"to":"none"}', b'{"from":"file"}'])
def test_other_orders_are_refused(site: Site, body: bytes) -> None:
    assert site.admin("POST", "key/rotate", body).status_code in (400, 404)


def test_rotation_is_logged_without_keys(site: Site) -> None:
    fill(site)
    answer = rotate(site).json()
    row = site.last("key.rotate")
    assert row["change"]["object"] == "secret/row-key"
    assert row["change"]["version"] == 2
    assert row["details"] == answer


# The row key's own row.


@pytest.mark.parametrize(
    "statement",
    ["UPDATE row_key SET generation = 5", "UPDATE row_key SET wrapped = zeroblob(112)",
     "UPDATE row_key SET commitment = zeroblob(32)", "UPDATE row_key SET provider = 'file:0'",
     "DELETE FROM row_key"],
)  # fmt: skip
def test_an_edited_row_key_does_not_open(site: Site, reopen: Opener, statement: str) -> None:
    import sqlite3

    with closing(sqlite3.connect(site.settings.data / "kbs.sqlite")) as connection, connection:
        connection.execute(statement)
    with pytest.raises(CaiError):
        reopen()
    assert site.admin("POST", "resource/a/b/c", b"x").status_code >= 400


def test_an_old_row_key_put_back_is_found(site: Site, reopen: Opener) -> None:
    import sqlite3

    path = site.settings.data / "kbs.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE kept AS SELECT * FROM row_key")
    rotate(site)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM row_key")
        connection.execute("INSERT INTO row_key SELECT * FROM kept")
    with pytest.raises(Tampered, match="audit log"):
        reopen()


def test_another_databases_row_key_does_not_open(site: Site, other_site: Site) -> None:
    core, other = site.broker.core, other_site.broker.core
    ring = Keyring.of(FileProvider.open(default_kek(site.settings.data)))
    rotation = Rotation(core.database, ring, instance=other.instance.id, realm="simulated")
    with pytest.raises(WrongKey):
        rotation.prepare("default")


# Status.


def test_status_shows_providers_and_signing_keys_but_no_key(site: Site) -> None:
    fill(site)
    status = site.admin("GET", "key").json()
    (provider,) = status["providers"]
    assert provider["in_force"]
    assert provider["trouble"] == ""
    assert provider["keys"] == 9
    assert {item["name"] for item in status["signing"]} == {name.value for name in KeyName}
    kek = default_kek(site.settings.data).read_text().strip()
    assert kek not in site.admin("GET", "key").text


# Signing keys.


@pytest.mark.parametrize("name", list(KeyName))
def test_signing_keys_rotate_with_overlap(site: Site, name: KeyName) -> None:
    from datetime import timedelta

    core = site.broker.core
    with core.database.read() as connection:
        first = core.signing.current(connection, name)
    answer = site.admin("POST", f"key/rotate-signing/{name.value}")
    assert answer.json()["version"] == 2
    now = core.clock()
    with core.database.read() as connection:
        current = core.signing.current(connection, name)
        living = core.signing.living(connection, name, now)
        overlap = OVERLAP_SECONDS[name] or 10**9
        later = core.signing.living(connection, name, now + timedelta(seconds=overlap + 5))
    assert current.id != first.id
    assert [key.id for key in living] == [current.id, first.id]
    assert living[1].retired is not None
    assert len(later) == (2 if OVERLAP_SECONDS[name] is None else 1)
    assert site.last("key.rotate-signing")["change"]["object"] == f"secret/{name.value}-key"


@pytest.mark.parametrize("name", ["", "nothing", "TOKEN", "token/x"])
def test_other_signing_keys_are_refused(site: Site, name: str) -> None:
    assert site.admin("POST", f"key/rotate-signing/{name}").status_code == 404


def test_certificates_name_the_realm_and_verify(site: Site) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    core = site.broker.core
    with core.database.read() as connection:
        key = core.signing.current(connection, KeyName.TOKEN)
        assert core.signing.current(connection, KeyName.TICKET).chain == ()
    leaf, root = (x509.load_der_x509_certificate(item) for item in key.chain)
    leaf.verify_directly_issued_by(root)
    root.verify_directly_issued_by(root)
    assert leaf.public_key() == key.es256.public_key()
    for certificate in (leaf, root):
        assert "O=SIMULATED" in certificate.subject.rfc4514_string()
        usage = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        assert usage.value.ca is (certificate is root)
    assert isinstance(root.public_key(), ec.EllipticCurvePublicKey)
    with pytest.raises(CaiError):
        _ = key.ed25519


@pytest.mark.parametrize(
    "statement",
    ["UPDATE signing_key SET sealed = zeroblob(200) WHERE name = 'token'",
     "UPDATE signing_key SET created = created - 1 WHERE name = 'token'",
     "UPDATE signing_key SET version = 9 WHERE name = 'token'",
     "DELETE FROM signing_key WHERE name = 'token'",
     "UPDATE signing_key SET sealed = (SELECT sealed FROM signing_key WHERE name = 'appraisal')"
     " WHERE name = 'token'"],
)  # fmt: skip
def test_edited_signing_keys_are_not_used(site: Site, statement: str) -> None:
    import sqlite3

    with closing(sqlite3.connect(site.settings.data / "kbs.sqlite")) as connection, connection:
        connection.execute(statement)
    core = site.broker.core
    with core.database.read() as connection, pytest.raises(CaiError):
        core.signing.current(connection, KeyName.TOKEN)
