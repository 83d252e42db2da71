"""Must show 1: a stock client of Trustee's protocol against the running program, over sockets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.cookies import SimpleCookie
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from cai.attest.policy import policy_for
from cai.attest.statement import ReleaseStatement
from kbs.admin.tokens import make_admin_token
from kbs.instance import read_admin_key
from kbs.server.kinds import KINDS
from tests.kbs.program import Key, Program, StockClient, b64u
from tests.kbs.world import FACTS, RELEASE_REGO, Visitor

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform

SECRET = b"stock-client-secret-91c2"
PATH = "models/qwen/key"
PREFIX = "/cai-test"


@dataclass
class Served:
    """A running broker with a policy for guests behind stock clients."""

    program: Program
    platform: SimulatedPlatform
    data: Path
    main: str
    compat: bool = False
    admin: str = field(default="")

    def client(self, **changes: Any) -> StockClient:
        return StockClient(self.main, self.platform, **changes)

    def administer(
        self, method: str, route: str, body: bytes | None = None, *, base: str = ""
    ) -> httpx.Response:
        key = read_admin_key(self.data / "admin.key")
        token = make_admin_token(key, now=datetime.now(UTC))
        return httpx.request(
            method, f"{base or self.admin}{route}", content=body, trust_env=False, timeout=60,
            headers={"Authorization": f"Bearer {token}"},
        )  # fmt: skip

    def policy(self, route: str, text: bytes, **more: str) -> None:
        body = json.dumps({"policy": b64u(text), **more}).encode()
        done = self.administer("POST", f"/kbs/v0/{route}", body)
        assert done.status_code == 200, done.text


def start(
    directory: Path, platform: SimulatedPlatform, anchors: Path, config: str, **more: Any
) -> Served:
    (directory / "kbs.toml").write_text(config)
    program = Program(
        directory, "--config", "kbs.toml", "--data", "data", "--unsafe-simulated-root", anchors
    )
    admin = program.ready["admin"]
    return Served(program, platform, directory / "data", program.url, admin=admin, **more)


def furnish(served: Served) -> None:
    visitor = Visitor(served.platform)
    loose = b"unsafe_any_launch_digest = true\nunsafe_without_facts = true"
    text = re.sub(rb"launch_digest = .*", loose, policy_for(visitor.facts()))
    served.policy("verification-policy", text)
    served.policy("resource-policy", RELEASE_REGO.read_bytes())
    done = served.administer("POST", f"/kbs/v0/resource/{PATH}", SECRET)
    assert done.status_code == 200, done.text


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, platform: SimulatedPlatform, platform_dir: Path
) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("served")
    config = f'[http]\nprefix = "{PREFIX}"\n'
    running = start(directory, platform, platform_dir / "anchors", config)
    try:
        furnish(running)
        yield running
    finally:
        running.program.close()


@pytest.fixture(scope="module")
def compat(
    tmp_path_factory: pytest.TempPathFactory, platform: SimulatedPlatform, platform_dir: Path
) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("compat")
    running = start(
        directory, platform, platform_dir / "anchors", '[http]\ncompat = "trustee"\n', compat=True
    )
    try:
        furnish(running)
        yield running
    finally:
        running.program.close()


# The cookie client.


@pytest.mark.parametrize("kind", ["P-256", "P-521", "RSA-2048", "RSA-3072"])
def test_every_kind_of_key_is_answered(served: Served, kind: str) -> None:
    client = served.client(key=Key(kind))
    assert client.get(PATH) == SECRET
    assert client.handshakes == 1
    # A second resource costs no second handshake.
    assert client.get(PATH) == SECRET
    assert client.handshakes == 1


def test_a_base_that_ends_in_a_slash(served: Served) -> None:
    assert StockClient(served.main + "/", served.platform).get(PATH) == SECRET


def test_the_older_version_is_served(served: Served) -> None:
    # Version 0.2.0 has no composite evidence, so a policy that demands a GPU denies it.
    client = served.client(version="0.2.0", gpus=0)
    refused = client.get(PATH)
    assert isinstance(refused, httpx.Response)
    assert refused.status_code == 403
    assert client.token
    assert "gpu.count" in refused.json()["detail"]


@pytest.mark.parametrize("version", ["0.1.0", "0.1.1"])
def test_the_oldest_versions_are_told(served: Served, version: str) -> None:
    client = served.client(version=version)
    assert client.auth().status_code == 200
    refused = client.handshake()
    assert refused.status_code == 400
    assert StockClient.require_error(refused) == "AttestationError"
    assert "KBS Client Protocol Version Mismatch" in refused.json()["detail"]


@pytest.mark.parametrize("version", ["0.3.0", "0.5.0", "1.0.0", "", "x"])
def test_other_versions_get_no_challenge(served: Served, version: str) -> None:
    refused = served.client(version=version).auth()
    assert refused.status_code == 400
    assert "set-cookie" not in refused.headers


def test_the_cookie_is_kept_from_scripts(served: Served) -> None:
    answer = served.client().auth()
    (cookie,) = SimpleCookie(answer.headers["set-cookie"]).values()
    assert re.fullmatch(r"[0-9a-f]{32}", cookie.value)
    assert cookie["httponly"]
    assert cookie["expires"]
    # A client takes the path of the request, whatever stands in front of us.
    assert not cookie["path"]
    assert not cookie["secure"]


def test_a_lost_session_costs_one_more_handshake(served: Served) -> None:
    client = served.client()
    assert client.get(PATH) == SECRET
    for cookie in client.http.cookies.jar:
        cookie.value = "0" * 32
    assert client.get(PATH) == SECRET
    assert client.handshakes == 2


def test_attesting_again_gives_the_same_token(served: Served) -> None:
    client = served.client()
    client.handshake()
    first = client.token
    again = client.http.post(client.route("attest"), json={"anything": 1})
    assert again.json()["token"] == first


def test_the_policy_that_a_client_names(served: Served) -> None:
    selector = "attestation-policy-selector"
    assert served.client(extra={selector: "default"}).get(PATH) == SECRET
    other = served.client(extra={selector: "laxer"}).get(PATH)
    assert isinstance(other, httpx.Response)
    assert other.status_code == 403
    assert "policy.selector" in other.json()["detail"]
    assert served.client(extra={selector: "../x"}).auth().status_code == 400


def test_our_own_member_does_not_disturb(served: Served) -> None:
    statement = ReleaseStatement("ab" * 48, FACTS, "0.1.0").to_json()
    assert served.client(statement=statement).get(PATH) == SECRET


def test_unknown_members_of_the_key_are_dropped(served: Served) -> None:
    client = served.client()
    nonce = client.auth().json()["nonce"]
    message = client.message(nonce)
    message["runtime-data"]["tee-pubkey"] = {**client.key.jwk, "use": "enc", "kid": "1"}
    assert client.http.post(client.route("attest"), json=message).status_code == 200


# The token client.


def test_a_token_is_as_good_as_the_cookie(served: Served) -> None:
    client = served.client()
    client.handshake()
    assert client.get_by_token(PATH) == SECRET


@pytest.mark.parametrize("token", ["x", "a.b.c", "e30.e30.e30", "a" * 300_000])
def test_other_tokens_are_refused(served: Served, token: str) -> None:
    client = served.client()
    client.token = token
    refused = client.get_by_token(PATH)
    assert isinstance(refused, httpx.Response)
    assert refused.status_code == 401


def test_an_altered_token_is_refused(served: Served) -> None:
    client = served.client()
    client.handshake()
    head, body, signature = client.token.split(".")
    flipped = ("A" if signature[0] != "A" else "B") + signature[1:]
    for token in (f"{head}.{body}.{flipped}", f"{head}.{body}.", f"{head}.{body[:-4]}.{signature}"):
        client.token = token
        refused = client.get_by_token(PATH)
        assert isinstance(refused, httpx.Response)
        assert refused.status_code == 401


# Refusals: the table with and without compat.

TABLE = [
    # what is asked, our status and kind, Trustee's status and kind
    ("nobody", 401, "TokenNotFound", 401, "TokenNotFound"),
    ("unknown cookie", 401, "TokenNotFound", 401, "TokenNotFound"),
    ("denied by policy", 403, "PolicyDeny", 401, "PolicyDeny"),
    ("missing resource", 404, "ResourceNotFound", 401, "PluginInternalError"),
    ("bad path", 404, "InvalidRequestPath", 404, "InvalidRequestPath"),
    ("unknown plugin", 404, "PluginNotFound", 404, "PluginNotFound"),
    ("malformed request", 400, "SerdeError", 401, "SerdeError"),
    ("other version", 400, "AttestationError", 401, "AttestationError"),
    ("debug guest", 403, "AttestationError", 401, "AttestationError"),
    ("too large", 413, "LimitExceeded", 401, "HTTPFailed"),
    ("foreign token", 401, "TokenVerifierError", 401, "TokenVerifierError"),
]


def ask(served: Served, what: str) -> httpx.Response:
    client = served.client()
    get = client.http.get
    match what:
        case "nobody":
            return get(client.route(f"resource/{PATH}"))
        case "unknown cookie":
            client.http.cookies.set("kbs-session-id", "0" * 32)
            return get(client.route(f"resource/{PATH}"))
        case "denied by policy":
            client.gpus = 2
            client.handshake()
            return get(client.route(f"resource/{PATH}"))
        case "missing resource":
            client.handshake()
            return get(client.route("resource/models/none/key"))
        case "bad path":
            client.handshake()
            return get(client.route("resource/models/x"))
        case "unknown plugin":
            return get(client.route("nebula-ca/credential"))
        case "malformed request":
            return client.http.post(client.route("auth"), json={"version": "0.4.0"})
        case "other version":
            client.version = "0.9.9"
            return client.auth()
        case "debug guest":
            client.debug = True
            return client.handshake()
        case "too large":
            return client.http.post(client.route("auth"), content=b" " * (3 << 20))
        case "foreign token":
            client.token = "a.b.c"
            refused = client.get_by_token(PATH)
            assert isinstance(refused, httpx.Response)
            return refused
        case _:
            raise AssertionError(what)


@pytest.mark.parametrize(("what", "status", "kind", "theirs", "their_kind"), TABLE)
def test_the_table_of_refusals(
    served: Served, compat: Served, what: str, status: int, kind: str, theirs: int, their_kind: str
) -> None:
    ours = ask(served, what)
    assert (ours.status_code, StockClient.require_error(ours)) == (status, kind), ours.text
    stock = ask(compat, what)
    assert (stock.status_code, StockClient.require_error(stock)) == (theirs, their_kind), stock.text


def test_a_missing_resource_costs_no_quotes(served: Served) -> None:
    client = served.client()
    answer = client.get("models/none/key")
    assert isinstance(answer, httpx.Response)
    assert (answer.status_code, client.handshakes) == (404, 1)


def test_errors_link_to_pages_that_exist(served: Served) -> None:
    refused = ask(served, "denied by policy").json()
    assert refused["type"].startswith(f"{PREFIX}/kbs/v0/errors/")
    base = served.main.removesuffix(PREFIX)
    page = httpx.get(f"{base}{refused['type']}", trust_env=False)
    assert page.status_code == 200
    assert page.text.startswith("PolicyDeny\n")
    for name in KINDS:
        assert httpx.get(f"{served.main}/kbs/v0/errors/{name}", trust_env=False).is_success
    nothing = httpx.get(f"{served.main}/kbs/v0/errors/Nothing", trust_env=False)
    assert nothing.status_code == 404


def test_every_answer_is_marked(served: Served) -> None:
    for answer in (ask(served, "nobody"), served.client().auth()):
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])


# Everything is under the prefix, and the administrators are elsewhere.


def test_nothing_is_served_beside_the_prefix(served: Served) -> None:
    base = served.main.removesuffix(PREFIX)
    for path in ("/kbs/v0/auth", "/as/certificate", "/cai-testx/kbs/v0/auth", PREFIX):
        answer = httpx.get(base + path, trust_env=False)
        assert answer.status_code == 404
        assert StockClient.require_error(answer) == "InvalidRequestPath"
    for probe in ("/healthz", "/readyz", f"{PREFIX}/healthz", f"{PREFIX}/readyz"):
        assert httpx.get(base + probe, trust_env=False).status_code == 200
    assert httpx.get(f"{served.main}/as/certificate", trust_env=False).status_code == 200


def test_no_path_is_guessed(served: Served) -> None:
    for path in ("/kbs/v0/auth/", "/as/certificate/", "/kbs/v0", "/kbs/v0/"):
        answer = httpx.post(f"{served.main}{path}", trust_env=False, content=b"{}")
        assert answer.status_code == 404, answer.text
        assert StockClient.require_error(answer) in ("InvalidRequestPath", "PluginNotFound")
    answer = served.administer("GET", "/kbs/v0/whoami/")
    assert answer.status_code == 404, answer.text


def test_administration_is_on_the_main_listener_only_for_stock_clients(
    served: Served, compat: Served
) -> None:
    route = "/kbs/v0/resource/models/other/key"
    refused = served.administer("POST", route, b"x", base=served.main)
    assert refused.status_code == 404
    assert StockClient.require_error(refused) == "PluginNotFound"
    assert compat.administer("POST", route, b"x", base=compat.main).status_code == 200
    stranger = httpx.post(f"{compat.main}{route}", content=b"x", trust_env=False)
    assert stranger.status_code == 401
    assert StockClient.require_error(stranger) == "AdminAuthAccess"


def test_the_log_tells_no_secret(served: Served, compat: Served) -> None:
    assert served.client().get(PATH) == SECRET
    for program in (served.program, compat.program):
        assert SECRET.decode() not in program.said()
        assert "Traceback" not in program.said()
