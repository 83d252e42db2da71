"""``kbs policy``: to whom it is released."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from cai import terminal
from cai.settings import read_settings_file
from cai.terminal import JsonFlag
from kbs.cli.admin_call import ADMIN_KEY, ADMIN_URL, AdminKey, AdminUrl, member, open_client

app = typer.Typer(help="To whom it is released.", no_args_is_help=True)


@app.command("set")
def policy_set(
    file: Annotated[Path, typer.Argument(help="Rego text.", metavar="FILE.rego")],
    *,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Set the release policy: who may have which resource."""
    _set_policy("resource-policy", "release policy", file, admin_url, admin_key)


@app.command("set-verification")
def policy_set_verification(
    file: Annotated[Path, typer.Argument(help="policy.toml", metavar="FILE.toml")],
    *,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Set the verification policy: which guests are accepted at all."""
    _set_policy("verification-policy", "verification policy", file, admin_url, admin_key)


@app.command("show")
def policy_show(
    *,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Print both policies as they are in force."""
    from hashlib import sha256

    from rich.text import Text

    from cai.attest.jwk import b64u_decode

    shown: dict[str, Any] = {}
    text = Text()
    with open_client(admin_url, admin_key) as client:
        for route in ("verification-policy", "resource-policy"):
            answer = client.get_or_none(route)
            if answer is None:
                shown[route] = None
                text.append(f"# {route}: none is set, so nothing is released\n")
                continue
            policy = b64u_decode(member(answer, "policy", str), what="policy")
            digest = sha256(policy).hexdigest()
            shown[route] = {"sha256": digest, "text": policy.decode("utf-8", "replace")}
            text.append(f"# {route}, sha256 {digest}\n{shown[route]['text']}\n")
    terminal.current().result(shown, text)


@app.command("template")
def policy_template(*, json_output: JsonFlag = False) -> None:
    """Print a strict release policy to start from."""
    from rich.text import Text

    text = files("kbs.policy.templates").joinpath("release.rego").read_text("utf-8")
    terminal.current().result({"text": text}, Text(text.removesuffix("\n")))


def _set_policy(route: str, what: str, file: Path, admin_url: str, admin_key: Path) -> None:
    import json

    from cai.attest.jwk import b64u_encode

    text = read_settings_file(file, what=what)
    body = json.dumps({"policy": b64u_encode(text)}).encode("ascii")
    with open_client(admin_url, admin_key) as client:
        answer = client.post(route, body)
    digest = member(answer, "sha256", str)
    terminal.current().result(
        {"policy": route, "sha256": digest}, f"{what} is now {file}, sha256 {digest}"
    )
