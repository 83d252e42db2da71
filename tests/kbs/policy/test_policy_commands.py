"""``kbs policy`` and ``kbs reference`` against a served broker, and the dry run without one."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from cai.attest.evidence import Evidence
from cai.attest.evidence_file import EvidenceFile
from cai.attest.policy import policy_for
from cai.attest.statement import ChannelStatement, GpuFacts, Purpose, report_data
from cai.terminal import run_app
from kbs.cli import app
from kbs.policy.references import Bundle
from kbs.policy.templates import TEMPLATES, template
from tests.kbs.world import FACTS, Visitor

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform

RUN = [sys.executable, "-c", "from kbs.cli import main; main()"]
ROOT = Path(__file__).parents[3]
ALLOW = "package policy\n\ndefault allow := true\n"
DENY = "package policy\n\ndefault allow := false\n"
NONCE = bytes(32)


@dataclass
class Done:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Kbs = Callable[..., Done]


@pytest.fixture
def kbs(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Kbs]:
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str | Path) -> Done:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["kbs", *map(str, arguments)])
        status = run_app("kbs", app)
        out, err = capfd.readouterr()
        return Done(status, out, err)

    yield run
    signal.signal(signal.SIGTERM, before)


# Against a served broker.


@dataclass
class Served:
    """A broker in a process of its own."""

    directory: Path
    admin: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, platform_dir: Path) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("served")
    process = subprocess.Popen(
        [*RUN, "serve", "--json", "--data", "data", "--listen", "127.0.0.1:0",
         "--admin-listen", "127.0.0.1:0", "--unsafe-simulated-root", platform_dir / "anchors"],
        stdout=subprocess.PIPE, text=True, cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    yield Served(directory, ready["admin"])
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    process.stdout.close()


@pytest.fixture
def remote(
    served: Served, kbs: Kbs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Kbs:
    """Commands of the administrator of the served broker, in an empty directory."""
    monkeypatch.setenv("KBS_ADMIN_URL", served.admin)
    monkeypatch.setenv("KBS_ADMIN_KEY", str(served.directory / "data" / "admin.key"))
    monkeypatch.chdir(tmp_path)
    return kbs


def test_policies_come_and_go(remote: Kbs, tmp_path: Path) -> None:
    (tmp_path / "allow.rego").write_text(ALLOW)
    (tmp_path / "deny.rego").write_text(DENY)
    assert remote("policy", "set", "deny.rego", "--name", "resource/a").status == 0
    done = remote("policy", "set", "allow.rego", "--name", "resource/a", "--json")
    assert done.json["version"] == 2
    shown = remote("policy", "show", "resource/a")
    assert shown.out.rstrip("\n") == ALLOW.rstrip("\n")
    assert remote("policy", "show", "resource/a", "--version", "1", "--json").json["text"] == DENY
    versions = remote("policy", "versions", "resource/a", "--json").json["versions"]
    assert [(item["version"], item["author"]) for item in versions] == [(1, "admin"), (2, "admin")]
    difference = remote("policy", "diff", "resource/a").out
    assert "-default allow := false" in difference
    assert "+default allow := true" in difference
    against = remote("policy", "diff", "resource/a", "--file", "deny.rego").out
    assert "+default allow := false" in against
    assert "no difference" in remote("policy", "diff", "resource/a", "--file", "allow.rego").out
    listed = remote("policy", "list", "--json").json["policies"]
    assert "resource/a" in [item["policy"] for item in listed]
    assert "resource/a" in remote("policy", "list").out
    assert remote("policy", "remove", "resource/a").status == 0
    assert remote("policy", "show", "resource/a").status == 3
    assert remote("policy", "remove", "resource/a").status == 3
    assert remote("policy", "bind", "kbs:///a/b", "strict").status == 0
    assert remote("policy", "show", "binding/a/b").out.strip() == "strict"


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("show", "nothing/a"), 3), (("show", "resource/a/b/c/d"), 3), (("versions", "x"), 3),
        (("set", "none.rego"), 3), (("set", "bad.rego"), 3),
        (("set", "good.rego", "--name", "attestation/x"), 3), (("bind", "a", "b c"), 3),
        (("diff", "resource/never"), 3), (("template", "nothing"), 3),
    ],
)  # fmt: skip
def test_what_cannot_be(
    remote: Kbs, tmp_path: Path, arguments: tuple[str, ...], status: int
) -> None:
    (tmp_path / "bad.rego").write_text("package policy\nallow := opa.runtime()\n")
    (tmp_path / "good.rego").write_text(ALLOW)
    done = remote("policy", *arguments)
    assert done.status == status, done.err
    assert "Traceback" not in done.err


def test_one_version_has_no_difference(remote: Kbs, tmp_path: Path) -> None:
    (tmp_path / "allow.rego").write_text(ALLOW)
    remote("policy", "set", "allow.rego", "--name", "resource/single")
    assert remote("policy", "diff", "resource/single").status == 2


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_can_be_set(remote: Kbs, tmp_path: Path, name: str) -> None:
    assert remote("policy", "template", name, "-o", "p.rego").status == 0
    assert (tmp_path / "p.rego").read_text() == template(name)
    assert remote("policy", "template", name, "-o", "p.rego").status != 0
    kind, _, tee = name.partition("-")
    place = f"attestation/t_{tee}" if kind == "attestation" else "resource/templates"
    assert remote("policy", "set", "p.rego", "--name", place).status == 0
    assert name in remote("policy", "template", "--list").out


def write_keys(directory: Path) -> tuple[Ed25519PrivateKey, ec.EllipticCurvePrivateKey]:
    ed, cosign = Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())
    for name, key in (("ed", ed), ("cosign", cosign)):
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (directory / f"{name}.pub").write_bytes(public)
    private = ed.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (directory / "ed.key").write_bytes(private)
    (directory / "ed.key").chmod(0o600)
    return ed, cosign


def test_reference_values_come_and_go(remote: Kbs, tmp_path: Path) -> None:
    _, cosign = write_keys(tmp_path)
    for name in ("ed", "cosign"):
        assert remote("reference", "keys", "add", name, f"{name}.pub").status == 0
    assert "ecdsa-p256" in remote("reference", "keys", "list").out
    (tmp_path / "values.json").write_text('{"rtmr_1": ["aa"], "gpu_count": 8}')
    done = remote("reference", "sign", "values.json", "--key", "ed.key", "-o", "b.json",
                  "--name", "release")  # fmt: skip
    assert done.status == 0, done.err
    done = remote("reference", "add", "b.json")
    assert done.status == 0, done.err
    # As `cosign sign-blob` does: base64 of a DER signature over SHA-256 of the file.
    data = Bundle.parse((tmp_path / "b.json").read_bytes())
    other = replace(data, name="second", values={"rtmr_2": ["bb"]}).encode()
    (tmp_path / "c.json").write_bytes(other)
    signature = base64.b64encode(cosign.sign(other, ec.ECDSA(hashes.SHA256())))
    (tmp_path / "c.sig").write_bytes(signature + b"\n")
    assert remote("reference", "add", "c.json").status == 3
    assert remote("reference", "add", "c.json", "--signature", "c.sig").status == 0
    assert remote("reference", "add", "c.json", "--signature", "b.json.sig").status == 7
    payload = base64.b64encode(b'{"svn": 1}').decode()
    message = {"version": "0.1.0", "type": "sample", "payload": payload}
    (tmp_path / "m.json").write_text(json.dumps(message))
    assert remote("reference", "import", "m.json").status == 0
    assert remote("reference", "import", "values.json", "--tenant", "models").status == 0
    listed = remote("reference", "list", "--json").json
    values = {item["id"]: item for item in listed["values"]}
    assert values["rtmr_1"]["source"] == "bundle release"
    assert values["svn"]["source"] == "value"
    days = datetime.fromisoformat(values["svn"]["expires"]) - datetime.now(UTC)
    assert 364 <= days.total_seconds() / 86400 <= 365
    assert remote("reference", "remove", "svn").status == 0
    assert remote("reference", "remove", "svn").status == 3
    assert remote("reference", "remove", "--bundle", "second").status == 0
    assert remote("reference", "keys", "remove", "ed").status == 0
    left = remote("reference", "list", "--json").json["values"]
    assert left == []
    assert "gpu_count" in remote("reference", "list", "--tenant", "models").out


# The dry run.


@pytest.fixture(scope="module")
def evidence(platform: SimulatedPlatform, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guest's evidence with a statement, in a file."""
    from cai.attest.sim import GuestSettings

    devices = platform.devices(1).collect(NONCE)
    digest = Evidence(b"", devices).gpu_digest.hex()
    statement = ChannelStatement(
        launch_digest="ab" * 48, service_id="model", owner_key="", models=(),
        gpu=GpuFacts(digest, NONCE.hex(), 1), guest_facts=FACTS, ticket_digest="",
        dialects=("cai/1",), boot_id="00" * 16, epoch=0, session_root="00" * 32, session_size=1,
    ).encode()  # fmt: skip
    guest = platform.guest(GuestSettings(image="demo"))
    quote = guest.quote(report_data(statement, Purpose.CHANNEL))
    path = tmp_path_factory.mktemp("evidence") / "guest.json"
    path.write_bytes(EvidenceFile(Evidence(quote, devices), statement).encode())
    return path


@pytest.fixture
def trial(
    kbs: Kbs, evidence: Path, platform_dir: Path, visitor: Visitor, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Kbs:  # fmt: skip
    """``kbs policy test`` beside a policy.toml and an evidence file that fit each other."""
    monkeypatch.chdir(tmp_path)
    # No broker is asked.
    monkeypatch.setenv("KBS_ADMIN_URL", "http://127.0.0.1:9")
    (tmp_path / "policy.toml").write_bytes(policy_for(visitor.facts()))
    (tmp_path / "strict.rego").write_text(template("strict"))

    def run(file: str, *more: str | Path) -> Done:
        anchors = platform_dir / "anchors"
        return kbs("policy", "test", file, "--evidence", evidence, "--unsafe-simulated-root",
                   anchors, "--collateral", anchors / "collateral", *more)  # fmt: skip

    return run


def test_a_dry_run_prints_three_layers(trial: Kbs) -> None:
    done = trial("strict.rego", "--verification", "policy.toml")
    assert done.status == 0, done.out + done.err
    for word in ("Layer 1", "Layer 2", "Layer 3", "cpu0: affirming", "ALLOW [SIMULATED]"):
        assert word in done.out
    found = trial("policy.toml", "--release", "strict.rego", "--json").json
    assert found["decision"] == "allow"
    layers = found["layers"]
    assert (layers["1"], layers["2"], layers["3"]) == ("pass", "pass", "pass")
    assert any("freshness" in risk for risk in found["residual_risks"])


def layers(done: Done) -> tuple[str, ...]:
    assert done.status == 7, done.out + done.err
    found = json.loads(done.out.splitlines()[0])["layers"]
    return found["1"], found["2"], found["3"]


def test_a_layer_that_is_not_given_denies(trial: Kbs) -> None:
    assert layers(trial("strict.rego", "--json")) == ("pass", "fail", "pass")
    assert layers(trial("policy.toml", "--json")) == ("pass", "pass", "fail")


def test_each_layer_denies_by_itself(trial: Kbs, tmp_path: Path, visitor: Visitor) -> None:
    (tmp_path / "deny.rego").write_text(DENY)
    both = ("--verification", "policy.toml", "--json")
    assert layers(trial("deny.rego", *both)) == ("pass", "pass", "fail")
    other = policy_for(visitor.facts(), launch_digest="cd" * 48)
    (tmp_path / "other.toml").write_bytes(other)
    assert layers(trial("other.toml", "--release", "strict.rego", "--json"))[1] == "fail"
    late = ("--at", "2099-01-01T00:00:00Z")
    assert layers(trial("strict.rego", *both, *late)) == ("fail", "not asked", "not asked")
    assert "DENY" in trial("deny.rego", "--verification", "policy.toml").out


def test_attestation_policies_with_values(trial: Kbs, tmp_path: Path, visitor: Visitor) -> None:
    (tmp_path / "my-cpu.rego").write_text(template("attestation-cpu"))
    rest = ("--verification", "policy.toml", "--release", "strict.rego")
    assert layers(trial("my-cpu.rego", *rest, "--json"))[2] == "fail"
    body = visitor.facts().tdx.body
    names = ("mr_td", "mr_seam", "rtmr_0", "rtmr_1", "rtmr_2", "xfam")
    values = {name: [body[name]] for name in names}
    (tmp_path / "values.json").write_text(json.dumps(values))
    done = trial("my-cpu.rego", *rest, "--references", "values.json", "--json")
    assert done.status == 0, done.out + done.err
    assert done.json["layers"]["submodules"][0]["vector"]["hardware"] == 2


@pytest.mark.parametrize(
    ("file", "more", "status"),
    [
        ("none.rego", (), 3), ("bad.rego", (), 3), ("strict.rego", ("--at", "soon"), 2),
        ("strict.rego", ("--resource", "x"), 3), ("strict.rego", ("--release", "strict.rego"), 2),
        ("policy.toml", ("--verification", "policy.toml"), 2),
        ("strict.rego", ("--references", "bad.rego"), 3),
        ("strict.rego", ("--attestation", "strict.rego"), 2),
    ],
)  # fmt: skip
def test_wrong_use(
    trial: Kbs, tmp_path: Path, file: str, more: tuple[str, ...], status: int
) -> None:
    (tmp_path / "bad.rego").write_text("package policy\nallow := http.send({})\n")
    done = trial(file, *more)
    assert done.status == status, done.out + done.err
    assert "Traceback" not in done.err
