"""The command line of the key broker: serve it, and administer it over its admin listener."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cai import terminal
from cai.errors import FormatError
from cai.settings import read_settings_file
from cai.terminal import JsonFlag, run_app

if TYPE_CHECKING:
    from kbs.admin_client import AdminClient
    from kbs.service import Ready

app = typer.Typer(
    name="kbs",
    help="Give a model's key to a guest that proved itself, and to nobody else.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
resource_app = typer.Typer(help="What is released.", no_args_is_help=True)
policy_app = typer.Typer(help="To whom it is released.", no_args_is_help=True)
audit_app = typer.Typer(help="What was decided.", no_args_is_help=True)
app.add_typer(resource_app, name="resource")
app.add_typer(policy_app, name="policy")
app.add_typer(audit_app, name="audit")

AdminUrl = Annotated[str, typer.Option(help="The broker's admin listener.", metavar="URL")]
AdminKey = Annotated[
    Path, typer.Option(help="The administrator's private key.", metavar="FILE")
]
ADMIN_URL = "http://127.0.0.1:8081"
ADMIN_KEY = Path("kbs-data/admin.key")


@app.command()
def serve(
    *,
    data: Annotated[Path, typer.Option(help="Data directory, made on first start.")] = Path(
        "kbs-data"
    ),
    listen: Annotated[str, typer.Option(help="Main listener.", metavar="HOST:PORT")] = (
        "127.0.0.1:8080"
    ),
    admin_listen: Annotated[
        str, typer.Option(help="Admin listener, loopback only.", metavar="HOST:PORT")
    ] = "127.0.0.1:8081",
    kek: Annotated[
        Path | None,
        typer.Option(help="Key encryption key, outside DATA; default DATA-kek/kek."),
    ] = None,
    collateral: Annotated[
        Path | None, typer.Option(help="Bundle or directory of Intel's collateral.")
    ] = None,
    rims: Annotated[
        Path | None, typer.Option(help="Directory of NVIDIA's reference measurements.")
    ] = None,
    ocsp: Annotated[
        Path | None, typer.Option(help="Directory of NVIDIA's revocation answers.")
    ] = None,
    unsafe_simulated_root: Annotated[
        Path | None,
        typer.Option(help="UNSAFE: trust this simulator instead of Intel and NVIDIA."),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Run the key broker until SIGTERM or SIGINT; port 0 takes a free port and tells it."""
    from kbs.service import ServeSettings
    from kbs.service import serve as run

    speaker = terminal.current()
    if unsafe_simulated_root is not None:
        speaker.warn(
            "unsafe_simulated_root: SIMULATED platforms are trusted; nothing released here was "
            "protected by hardware"
        )
    elif collateral is None:
        speaker.warn("no --collateral: every quote will be refused")

    def ready(where: Ready) -> None:
        realm = "simulated realm [SIMULATED]" if where.unsafe else "production realm"
        speaker.result(
            {
                "listening": where.listening,
                "admin": where.admin,
                "realm": where.realm,
                "unsafe": list(where.unsafe),
                "data": str(where.data),
            },
            f"kbs listens on {where.listening}, admin on {where.admin}, {realm}",
        )

    run(
        ServeSettings(
            data, listen, admin_listen, kek, collateral, unsafe_simulated_root, rims, ocsp
        ),
        ready,
    )


@resource_app.command("set")
def resource_set(
    uri: Annotated[str, typer.Argument(help="kbs:///repository/type/tag", metavar="URI")],
    file: Annotated[Path, typer.Argument(help="Its exact bytes.", metavar="FILE")],
    *,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Store the next version of a resource."""
    from cai.secret import read_secret_file
    from kbs.names import ResourceName

    name = ResourceName.parse(uri)
    contents = read_secret_file(file, what="resource")
    with _client(admin_url, admin_key) as client:
        answer = client.post(f"resource/{name.path}", contents.reveal())
    version = _member(answer, "version", int)
    terminal.current().result(
        {"resource": name.uri, "version": version}, f"{name.uri} is now version {version}"
    )


@policy_app.command("set")
def policy_set(
    file: Annotated[Path, typer.Argument(help="Rego text.", metavar="FILE.rego")],
    *,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Set the release policy: who may have which resource."""
    _set_policy("resource-policy", "release policy", file, admin_url, admin_key)


@policy_app.command("set-verification")
def policy_set_verification(
    file: Annotated[Path, typer.Argument(help="policy.toml", metavar="FILE.toml")],
    *,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Set the verification policy: which guests are accepted at all."""
    _set_policy("verification-policy", "verification policy", file, admin_url, admin_key)


@policy_app.command("show")
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
    with _client(admin_url, admin_key) as client:
        for route in ("verification-policy", "resource-policy"):
            answer = client.get_or_none(route)
            if answer is None:
                shown[route] = None
                text.append(f"# {route}: none is set, so nothing is released\n")
                continue
            policy = b64u_decode(_member(answer, "policy", str), what="policy")
            digest = sha256(policy).hexdigest()
            shown[route] = {"sha256": digest, "text": policy.decode("utf-8", "replace")}
            text.append(f"# {route}, sha256 {digest}\n{shown[route]['text']}\n")
    terminal.current().result(shown, text)


@policy_app.command("template")
def policy_template(*, json_output: JsonFlag = False) -> None:
    """Print a strict release policy to start from."""
    from rich.text import Text

    text = files("kbs.policies").joinpath("release.rego").read_text("utf-8")
    terminal.current().result({"text": text}, Text(text.removesuffix("\n")))


@audit_app.command("show")
def audit_show(
    *,
    start: Annotated[int, typer.Option("--from", help="First row.", min=0)] = 0,
    limit: Annotated[int, typer.Option(help="Most rows.", min=1, max=1000)] = 100,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Print the audit log: every decision with every check behind it."""
    with _client(admin_url, admin_key) as client:
        answer = client.get(f"audit?from={start}&limit={limit}")
    rows = _member(answer, "rows", list)
    speaker = terminal.current()
    speaker.result({"size": _member(answer, "size", int), "rows": rows}, _audit_table(rows))


def _audit_table(rows: list[Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1))
    for heading in ("seq", "time", "action", "decision", "subject", "reason"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        if not isinstance(row, dict):
            raise FormatError("audit answer: a row is not an object")
        texts = {name: str(row.get(name, "")) for name in row}
        decision = texts.get("decision", "")
        mark = " [SIMULATED]" if row.get("simulated") else ""
        subject = texts.get("subject", "") or str(row.get("change", {}).get("object", ""))
        table.add_row(
            texts.get("seq", ""),
            texts.get("time", ""),
            texts.get("action", "") + mark,
            Text(decision, style="green" if decision == "allow" else "red"),
            Text(subject),
            Text(texts.get("reason", "")),
        )
    return table


def _set_policy(route: str, what: str, file: Path, admin_url: str, admin_key: Path) -> None:
    import json

    from cai.attest.jwk import b64u_encode

    text = read_settings_file(file, what=what)
    body = json.dumps({"policy": b64u_encode(text)}).encode("ascii")
    with _client(admin_url, admin_key) as client:
        answer = client.post(route, body)
    digest = _member(answer, "sha256", str)
    terminal.current().result(
        {"policy": route, "sha256": digest}, f"{what} is now {file}, sha256 {digest}"
    )


def _client(admin_url: str, admin_key: Path) -> AdminClient:
    from kbs.admin_client import AdminClient
    from kbs.instance import read_admin_key

    return AdminClient(
        admin_url, read_admin_key(admin_key), clock=lambda: datetime.now(UTC)
    )


def _member(answer: dict[str, Any], name: str, kind: type) -> Any:
    value = answer.get(name)
    if not isinstance(value, kind):
        raise FormatError(f"admin answer: {name} is missing or of another kind")
    return value


def main() -> None:
    """Entry point of the console script ``kbs``."""
    sys.exit(run_app("kbs", app))
