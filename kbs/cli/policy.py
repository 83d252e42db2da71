"""``kbs policy``: to whom it is released."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cai import terminal
from cai.errors import InputMissing, UsageError
from cai.settings import read_settings_file
from cai.terminal import JsonFlag
from kbs.cli.admin_call import ADMIN_KEY, ADMIN_URL, AdminKey, AdminUrl, member, open_client
from kbs.cli.policy_trial import policy_test

if TYPE_CHECKING:
    from kbs.admin.client import AdminClient
    from kbs.policy.names import PolicyName

app = typer.Typer(help="To whom it is released.", no_args_is_help=True)
app.command("test")(policy_test)

Name = Annotated[
    str,
    typer.Argument(
        help="resource/PREFIX, verification/ID, attestation/ID_cpu or binding/PREFIX.",
        metavar="NAME",
    ),
]


@app.command("list")
def policy_list(
    *,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """List every policy that is set."""
    with open_client(admin_url, admin_key) as client:
        listed = member(client.get("policies"), "policies", list)
    headings = ("policy", "version", "time", "author", "sha256")
    terminal.current().result({"policies": listed}, _table(listed, headings))


@app.command("set")
def policy_set(
    file: Annotated[Path, typer.Argument(help="Rego, or policy.toml.", metavar="FILE")],
    *,
    name: Annotated[
        str,
        typer.Option(
            help="Its name; by default resource/ for Rego and verification/default for TOML.",
            metavar="NAME",
        ),
    ] = "",
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Store the next version of a policy."""
    path = name or ("verification/default" if file.suffix == ".toml" else "resource/")
    _set_policy(path, file, admin_url, admin_key)


@app.command("set-verification")
def policy_set_verification(
    file: Annotated[Path, typer.Argument(help="policy.toml", metavar="FILE.toml")],
    *,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Set the verification policy: which guests are accepted at all."""
    _set_policy("verification/default", file, admin_url, admin_key)


@app.command("bind")
def policy_bind(
    prefix: Annotated[str, typer.Argument(help="Prefix of resource paths.", metavar="PREFIX")],
    policy_id: Annotated[str, typer.Argument(help="Policy id.", metavar="ID")],
    *,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Appraise the guests that ask for these resources with the policies of this id."""
    from kbs.policy.store import parse_binding

    parse_binding(policy_id.encode("utf-8"))
    name = _parsed(f"binding/{prefix.removeprefix('kbs:///')}")
    with open_client(admin_url, admin_key) as client:
        _post(client, name, policy_id.encode("ascii"))
    terminal.current().result(
        {"prefix": name.rest, "policy_id": policy_id},
        f"resources under kbs:///{name.rest} are now appraised by {policy_id}",
    )


@app.command("show")
def policy_show(
    name: Annotated[
        str, typer.Argument(help="Its name; without one, what applies everywhere.", metavar="NAME")
    ] = "",
    *,
    version: Annotated[int | None, typer.Option(help="An older version.", min=1)] = None,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Print a policy exactly as it is stored."""
    from rich.text import Text

    with open_client(admin_url, admin_key) as client:
        if name:
            found = _fetch(client, _parsed(name), version)
            body = {**found, "text": found["text"].decode("utf-8", "replace")}
            terminal.current().result(body, Text(body["text"].removesuffix("\n")))
            return
        shown: dict[str, Any] = {}
        text = Text()
        for path in ("verification/default", "resource/"):
            try:
                found = _fetch(client, _parsed(path), None)
            except InputMissing:
                shown[path] = None
                text.append(f"# {path}: none is set, so nothing is released\n")
                continue
            shown[path] = {**found, "text": found["text"].decode("utf-8", "replace")}
            text.append(f"# {path}, sha256 {found['sha256']}\n{shown[path]['text']}\n")
    terminal.current().result(shown, text)


@app.command("versions")
def policy_versions(
    name: Name,
    *,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """List every version of a policy: when, by whom, and its hash."""
    with open_client(admin_url, admin_key) as client:
        answer = client.get(f"policy-versions/{_parsed(name).path}")
    versions = member(answer, "versions", list)
    headings = ("version", "time", "author", "removed", "sha256")
    terminal.current().result({"versions": versions}, _table(versions, headings))


@app.command("diff")
def policy_diff(
    name: Name,
    old: Annotated[int | None, typer.Option("--from", help="Older version.", min=1)] = None,
    new: Annotated[int | None, typer.Option("--to", help="Newer version.", min=1)] = None,
    *,
    file: Annotated[Path | None, typer.Option(help="Compare with this file instead.")] = None,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Show what changed between two versions, by default the last two, or what a file changes."""
    import difflib

    from rich.text import Text

    if file is not None and new is not None:
        raise UsageError("--to and --file exclude each other")
    with open_client(admin_url, admin_key) as client:
        parsed = _parsed(name)
        if file is not None:
            before = _fetch(client, parsed, old)
            after: dict[str, Any] = {
                "version": str(file), "text": read_settings_file(file, what="policy"),
            }  # fmt: skip
        else:
            after = _fetch(client, parsed, new)
            before = _fetch(client, parsed, old if old is not None else _before(after["version"]))
    lines = list(
        difflib.unified_diff(
            before["text"].decode("utf-8", "replace").splitlines(),
            after["text"].decode("utf-8", "replace").splitlines(),
            f"{parsed.path} version {before['version']}", f"{parsed.path} {after['version']}",
            lineterm="",
        )
    )  # fmt: skip
    text = "\n".join(lines) if lines else "no difference"
    terminal.current().result(
        {"from": before["version"], "to": after["version"], "diff": lines}, Text(text)
    )


@app.command("remove")
def policy_remove(
    name: Name,
    *,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Take a policy away; its versions stay readable."""
    parsed = _parsed(name)
    with open_client(admin_url, admin_key) as client:
        answer = client.delete(f"policy/{parsed.path}")
    terminal.current().result(
        {"policy": parsed.path, "version": member(answer, "version", int)},
        f"{parsed.path} is no longer in force",
    )


@app.command("template")
def policy_template(
    name: Annotated[
        str, typer.Argument(help="strict, tdx, tdx-gpu, …; without one, strict.", metavar="NAME")
    ] = "strict",
    *,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write it to this new file.")
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="List the templates.")] = False,
    json_output: JsonFlag = False,
) -> None:
    """Print a sound policy to start from."""
    from rich.text import Text

    from kbs.policy.templates import TEMPLATES, template

    if listing:
        rows = [{"name": item, "what": what} for item, (_, what) in TEMPLATES.items()]
        terminal.current().result({"templates": rows}, _table(rows, ("name", "what")))
        return
    text = template(name)
    if output is not None:
        _write_new(output, text)
        terminal.current().result({"file": str(output)}, f"wrote {output}; read it before use")
        return
    terminal.current().result({"text": text}, Text(text.removesuffix("\n")))


def _set_policy(path: str, file: Path, admin_url: str, admin_key: Path) -> None:
    name = _parsed(path)
    text = read_settings_file(file, what="policy")
    with open_client(admin_url, admin_key) as client:
        answer = _post(client, name, text)
    digest = member(answer, "sha256", str)
    version = member(answer, "version", int)
    terminal.current().result(
        {"policy": name.path, "sha256": digest, "version": version},
        f"{name.path} is now {file}, version {version}, sha256 {digest}",
    )


def _post(client: AdminClient, name: PolicyName, text: bytes) -> dict[str, Any]:
    import json

    from cai.attest.jwk import b64u_encode

    body = json.dumps({"policy": b64u_encode(text)}).encode("ascii")
    return client.post(f"policy/{name.path}", body)


def _fetch(client: AdminClient, name: PolicyName, version: int | None) -> dict[str, Any]:
    from cai.attest.jwk import b64u_decode

    query = "" if version is None else f"?version={version}"
    answer = client.get(f"policy/{name.path}{query}")
    return {
        "policy": name.path,
        "version": member(answer, "version", int),
        "sha256": member(answer, "sha256", str),
        "text": b64u_decode(member(answer, "policy", str), what="policy"),
    }


def _before(version: int) -> int:
    if version < 2:
        raise UsageError("there is one version only", hint="compare with a file: --file FILE")
    return version - 1


def _parsed(name: str) -> PolicyName:
    from kbs.policy.names import PolicyName

    return PolicyName.parse(name)


def _write_new(path: Path, text: str) -> None:
    from cai.errors import from_os_error

    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise from_os_error(error, f"write {path}") from error


def _table(rows: list[Any], headings: tuple[str, ...]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(row.get(heading, ""))) for heading in headings))
    return table
