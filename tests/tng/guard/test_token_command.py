"""``tng token``: what it shows, what it never shows, and its exit status."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path


def tng(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tng", *args], capture_output=True, text=True, timeout=60,
        env={**os.environ, **env}, check=False,
    )  # fmt: skip


def test_a_token_from_its_making_to_its_end(tmp_path: Path) -> None:
    file = str(tmp_path / "tokens.json")
    made = tng("token", "create", "alice", "-f", file, "--requests", "60", "--json")
    assert made.returncode == 0, made.stderr
    value = json.loads(made.stdout)
    secret = value["token"]
    assert secret.startswith(f"cai_{value['id']}_")
    assert value["expires"] > value["created"]
    assert stat.S_IMODE(Path(file).stat().st_mode) == 0o600

    listed = tng("token", "list", "--json", TNG_TOKENS=file)
    found = json.loads(listed.stdout)["tokens"]
    assert [(row["name"], row["state"]) for row in found] == [("alice", "valid")]
    assert found[0]["limits"]["requests_per_minute"] == 60
    shown = tng("token", "list", "-f", file)
    hidden = secret.split("_", 2)[2]
    assert hidden not in listed.stdout + shown.stdout + Path(file).read_text()
    assert "alice" in shown.stdout

    assert tng("token", "revoke", value["id"], "-f", file).returncode == 0
    listed = tng("token", "list", "--json", "-f", file)
    assert json.loads(listed.stdout)["tokens"][0]["state"] == "revoked"


def test_a_token_into_a_file_of_its_own(tmp_path: Path) -> None:
    file, out = str(tmp_path / "tokens.json"), tmp_path / "alice.token"
    made = tng("token", "create", "alice", "-f", file, "--out", str(out), "--days", "0", "--json")
    assert made.returncode == 0, made.stderr
    assert out.read_text().startswith("cai_")
    assert out.read_text() not in made.stdout + made.stderr
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert json.loads(made.stdout)["expires"] == 0


def test_what_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    for args, status in (
        (("list", "-f", str(file)), 3),
        (("revoke", "nobody", "-f", str(file)), 3),
        (("create", "alice"), 2),
        (("create", " ", "-f", str(file)), 2),
        (("create", "alice", "-f", str(file), "--days", "-1"), 2),
        (("create", "alice", "-f", str(tmp_path / "none" / "x")), 3),
    ):
        done = tng("token", *args)
        assert done.returncode == status, (args, done.stderr)
        assert "Traceback" not in done.stderr
    tng("token", "create", "alice", "-f", str(file))
    assert tng("token", "revoke", "bob", "-f", str(file)).returncode == 3
    file.chmod(0o644)
    done = tng("token", "list", "-f", str(file))
    assert done.returncode == 4
    assert "chmod 600" in done.stderr
