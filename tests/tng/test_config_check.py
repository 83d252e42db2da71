"""`tng config check`: what it says, and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

VERIFY = {"as_addr": "http://127.0.0.1:8080/as/", "policy_ids": ["default"]}


def check(*arguments: str) -> tuple[int, dict[str, object] | str, str]:
    done = subprocess.run(
        [sys.executable, "-c", "from tng.cli import main; main()", "config", "check", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    out = json.loads(done.stdout) if "--json" in arguments and done.stdout else done.stdout
    return done.returncode, out, done.stderr


def entry(**changes: object) -> str:
    proxy = {"proxy_listen": {"host": "127.0.0.1", "port": 41000}}
    return json.dumps({"add_ingress": [{"http_proxy": proxy, "verify": VERIFY, **changes}]})


def test_a_plain_configuration_has_nothing_to_remark() -> None:
    status, out, _err = check("--json", "--config-content", entry())
    assert status == 0
    assert isinstance(out, dict)
    assert out["starts"] is True
    assert out["notes"] == []


def test_clear_text_is_named_and_counts_as_started() -> None:
    status, out, _err = check("--json", "--config-content", entry(verify=None, no_ra=True))
    assert status == 0
    assert isinstance(out, dict)
    assert out["unsafe"] == ["unsafe_no_ra"]
    assert [note["kind"] for note in out["notes"]] == ["clear"]  # type: ignore[attr-defined]


def test_what_is_not_done_ends_with_2(tmp_path: Path) -> None:
    file = tmp_path / "tng.yaml"
    file.write_text(
        "add_ingress:\n- mapping_udp: {in: {port: 1}, out: {host: a, port: 2}}\n  no_ra: true\n"
    )
    status, out, _err = check(str(file))
    assert status == 2
    assert "NOT DONE" in out
    assert "UDP" in out


@pytest.mark.parametrize(
    ("arguments", "status"),
    [((), 2), (("--config-content", "{}"), 2), (("/nonexistent/x.json",), 3)],
)
def test_what_cannot_be_read(arguments: tuple[str, ...], status: int) -> None:
    found, out, err = check(*arguments)
    assert found == status
    assert out == ""
    assert "Traceback" not in err
