"""What people type with Trustee's ``kbs-client config``, under the same names.

They call the same routes that a stock ``kbs-client`` calls, so they also show what it would do
here (docs/kbs-administration.md §6). Two of its habits are not kept: a policy that allows
everything has to be spelt so, and nothing is printed that was released.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from cai import terminal
from cai.errors import FormatError, UsageError
from cai.terminal import JsonFlag
from kbs.cli.admin_call import ADMIN_KEY, ADMIN_URL, AdminKey, AdminUrl, open_client

PANEL: Final = "As kbs-client spells them"
"""Where ``kbs --help`` shows these verbs."""

DENY_ALL: Final = b"package policy\n\ndefault allow := false\n"
"""Nothing is released."""

ALLOW_ALL: Final = b"package policy\n\ndefault allow := true\n"
"""Everything is released to every guest that attests."""

AFFIRMING: Final = b"""package policy

import rego.v1

default allow := false

allow if {
\tdata.plugin == "resource"
\tcount(input.submods) > 0
\tevery submod in input.submods {
\t\tsubmod["ear.status"] == "affirming"
\t}
}
"""
"""Trustee's sample of that name: whatever is there is affirming. It demands no GPU."""

ResourcePath = Annotated[
    str, typer.Option("--path", help="repository/type/tag", metavar="PATH")
]


def set_resource(
    *,
    path: ResourcePath,
    resource_file: Annotated[Path, typer.Option(help="Its exact bytes.", metavar="FILE")],
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Store a resource; as `kbs resource set`."""
    from cai.secret import read_secret_file

    name = _resource(path)
    contents = read_secret_file(resource_file, what="resource")
    with open_client(admin_url, admin_key) as client:
        answer = client.post(f"resource/{name}", contents.reveal())
    terminal.current().result(answer, f"{name} is set")


def delete_resource(
    *,
    path: ResourcePath,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Delete a resource; as `kbs resource delete`, it can be restored for a while."""
    name = _resource(path)
    with open_client(admin_url, admin_key) as client:
        answer = client.delete(f"resource/{name}")
    terminal.current().result(answer, f"{name} is deleted")


def set_resource_policy(
    *,
    policy_file: Annotated[
        Path | None, typer.Option(help="Rego text.", metavar="FILE")
    ] = None,
    deny_all: Annotated[bool, typer.Option("--deny-all", help="Release nothing.")] = False,
    default: Annotated[
        bool, typer.Option("--default", help="The same as --deny-all, as in kbs-client.")
    ] = False,
    affirming: Annotated[
        bool, typer.Option("--affirming", help="Whatever attests is affirming; demands no GPU.")
    ] = False,
    allow_all: Annotated[bool, typer.Option("--allow-all", hidden=True)] = False,
    unsafe_allow_all: Annotated[
        bool,
        typer.Option("--unsafe-allow-all", help="UNSAFE: release everything to every guest."),
    ] = False,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Set the policy of every resource that has none of its own; as `kbs policy set`."""
    if allow_all:
        raise UsageError(
            "--allow-all releases every key to every guest that attests",
            hint="`kbs policy template` writes a sound policy; otherwise --unsafe-allow-all",
        )
    chosen = [
        text
        for text, wanted in (
            (DENY_ALL, deny_all or default), (AFFIRMING, affirming), (ALLOW_ALL, unsafe_allow_all),
        )
        if wanted
    ]  # fmt: skip
    if policy_file is not None:
        chosen.append(_read(policy_file))
    if len(chosen) != 1:
        raise UsageError("give one policy", hint="--policy-file, --deny-all or --affirming")
    speaker = terminal.current()
    if unsafe_allow_all:
        speaker.warn("unsafe_allow_all: every guest that attests gets every key")
    if affirming:
        speaker.warn("this policy demands no GPU; `kbs policy template` writes one that does")
    with open_client(admin_url, admin_key) as client:
        answer = client.post("resource-policy", _policy_message(chosen[0]))
    speaker.result(answer, f"the resource policy is set, sha256 {answer.get('sha256')}")


def set_attestation_policy(
    *,
    policy_file: Annotated[Path, typer.Option(help="Rego text.", metavar="FILE")],
    policy_type: Annotated[str, typer.Option("--type", help="Only rego.")] = "rego",
    policy_id: Annotated[
        str, typer.Option("--id", help="Id and class, e.g. default_gpu.", metavar="ID")
    ] = "default_cpu",
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Set an attestation policy: what the claims of one class of TEE are worth."""
    if policy_type != "rego":
        raise UsageError(f"--type {policy_type!r}: only rego is evaluated here")
    body = _policy_message(_read(policy_file), type=policy_type, policy_id=policy_id)
    with open_client(admin_url, admin_key) as client:
        answer = client.post("attestation-policy", body)
    terminal.current().result(answer, f"attestation policy {policy_id} is set")


def get_reference_value(
    *,
    name: Annotated[str, typer.Option("--id", help="Its name.", metavar="ID")],
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Print a reference value as JSON."""
    from urllib.parse import quote

    with open_client(admin_url, admin_key) as client:
        value = client.get_value(f"reference-value/{quote(name)}")
    text = json.dumps(value, ensure_ascii=False)
    terminal.current().result({"id": name, "value": value}, text)


def set_sample_reference_value(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    value: Annotated[str, typer.Argument(metavar="VALUE")],
    *,
    as_integer: Annotated[bool, typer.Option("--as-integer", help="A whole number.")] = False,
    as_bool: Annotated[bool, typer.Option("--as-bool", help="true or false.")] = False,
    as_single_value: Annotated[
        bool, typer.Option("--as-single-value", help="The value itself, not a list of one.")
    ] = False,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Set one reference value in Trustee's `sample` form; `kbs reference` takes signed bundles."""
    import base64

    typed = _typed(value, as_integer=as_integer, as_bool=as_bool)
    payload = json.dumps({name: typed if as_single_value else [typed]}).encode()
    message = {
        "version": "0.1.0", "type": "sample", "payload": base64.b64encode(payload).decode("ascii"),
    }  # fmt: skip
    with open_client(admin_url, admin_key) as client:
        answer = client.post("reference-value", json.dumps(message).encode())
    terminal.current().result(answer, f"{name} is set")


def add_verbs(app: typer.Typer) -> None:
    """Register these verbs."""
    for verb in (
        set_resource, delete_resource, set_resource_policy, set_attestation_policy,
        get_reference_value, set_sample_reference_value,
    ):  # fmt: skip
        app.command(verb.__name__.replace("_", "-"), rich_help_panel=PANEL)(verb)


def _resource(path: str) -> str:
    from kbs.names import ResourceName

    return ResourceName.parse(path).path


def _read(file: Path) -> bytes:
    from cai.settings import read_settings_file

    return read_settings_file(file, what="policy")


def _policy_message(text: bytes, **more: str) -> bytes:
    from cai.attest.jwk import b64u_encode

    return json.dumps({**more, "policy": b64u_encode(text)}).encode("ascii")


def _typed(text: str, *, as_integer: bool, as_bool: bool) -> Any:
    if as_integer and as_bool:
        raise UsageError("--as-integer and --as-bool exclude each other")
    if as_integer:
        if not (text.removeprefix("-").isascii() and text.removeprefix("-").isdigit()):
            raise FormatError(f"{text[:32]!r} is no whole number")
        return int(text[:20])
    if as_bool:
        if text not in ("true", "false"):
            raise FormatError(f"{text[:32]!r} is neither true nor false")
        return text == "true"
    return text
