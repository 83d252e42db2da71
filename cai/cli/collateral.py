"""``cai collateral``: Intel's statements about platforms, fetched, bundled and looked at."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cai.cli.collateral_gpu import gpu
from cai.errors import CaiError, UsageError
from cai.terminal import JsonFlag, current

if TYPE_CHECKING:
    from cai.attest.tdx.collateral import Collateral, CollateralStore

app = typer.Typer(
    name="collateral",
    help="Fetch Intel's collateral into a bundle for offline verification; show what is in one.",
    no_args_is_help=True,
)

SimulatedRoot = Annotated[
    Path | None,
    typer.Option(
        "--unsafe-simulated-root", help="Anchors of a simulated platform; never for real hosts."
    ),
]


@app.command()
def fetch(
    out: Annotated[Path, typer.Option("--out", help="Bundle to write, a tar archive.")],
    pcs: Annotated[
        str, typer.Option("--pcs", help="Base URL of Intel's PCS or of a PCCS.")
    ] = "https://api.trustedservices.intel.com",
    fmspc: Annotated[
        list[str] | None, typer.Option("--fmspc", help="Platform family, 12 hex digits.")
    ] = None,
    evidence: Annotated[
        list[Path] | None,
        typer.Option("--evidence", help="Evidence or quote of a platform, instead of its FMSPC."),
    ] = None,
    ca: Annotated[
        str, typer.Option("--ca", help="Authority of --fmspc: platform or processor.")
    ] = "platform",
    root_crl: Annotated[
        str, typer.Option("--root-crl", help="URL of the root's revocation list.")
    ] = "",
    update: Annotated[
        str, typer.Option("--update", help="TCB recovery to follow: standard or early.")
    ] = "standard",
    eval_data_number: Annotated[
        int, typer.Option("--eval-data-number", min=0, help="Exactly this generation.")
    ] = 0,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Fetch even what has half of its life left.")
    ] = False,
    unsafe_simulated_root: SimulatedRoot = None,
    json_output: JsonFlag = False,
) -> None:
    """Fetch collateral, verify it, and write it into a bundle.

    A bundle that exists is brought up to date: what has less than half of its life left is fetched
    anew, everything else is kept.
    """
    import httpx

    from cai.attest.tdx.collateral import CollateralStore, load_collateral
    from cai.attest.tdx.fetch import AUTHORITIES, Source, bundle_of, refreshed
    from cai.cli.verify import time_of

    if update not in ("standard", "early") or ca not in AUTHORITIES:
        raise UsageError(
            f"--update {update}, --ca {ca}", hint="standard or early; platform or processor"
        )
    source = Source.at(pcs, root_crl=root_crl, update=update, eval_data_number=eval_data_number)
    kept = load_collateral(out) if out.exists() else CollateralStore.empty()
    wanted = [(name, ca) for name in fmspc or ()] + [_family(path) for path in evidence or ()]
    if not wanted and not len(kept):
        raise UsageError("nothing to fetch", hint="give --fmspc or --evidence")
    root, now = _root(unsafe_simulated_root), time_of("")
    with httpx.Client(follow_redirects=False) as client:
        items, fetched = refreshed(
            client, source, kept, wanted, root=root, now=now, anew=refresh
        )
    _write(out, bundle_of(items))
    body = {
        "bundle": str(out), "fetched": len(fetched), "kept": len(items) - len(fetched),
        "items": [_described(item, root, now) for item in items],
    }  # fmt: skip
    current().result(body, _table(body["items"]))


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="Bundle, directory or single file.")],
    at: Annotated[str, typer.Option("--at", help="Time to judge at, RFC 3339.")] = "",
    unsafe_simulated_root: SimulatedRoot = None,
    json_output: JsonFlag = False,
) -> None:
    """Show collateral with its dates, and whether it verifies."""
    from cai.cli.verify import time_of

    now, root = time_of(at), _root(unsafe_simulated_root)
    items = [_described(item, root, now) for item in _load(path)]
    current().result({"items": items}, _table(items))


app.command("gpu")(gpu)


def _load(path: Path) -> CollateralStore:
    from cai.attest.tdx.collateral import CollateralStore, load_collateral, parse_collateral
    from cai.settings import read_settings_file

    if path.suffix != ".json":
        return load_collateral(path)
    item = parse_collateral(read_settings_file(path, what="collateral"), where=str(path))
    return CollateralStore([item] if item else [])


def _family(path: Path) -> tuple[str, str]:
    from cai.attest.evidence_file import MAX_EVIDENCE_FILE, decode_evidence
    from cai.attest.tdx.engine import platform_family
    from cai.attest.tdx.quote import parse_quote
    from cai.errors import from_os_error

    try:
        with path.open("rb") as file:
            data = file.read(MAX_EVIDENCE_FILE + 1)
    except OSError as error:
        raise from_os_error(error, f"read evidence {path}") from error
    return platform_family(parse_quote(decode_evidence(data, where=str(path)).evidence.quote))


def _root(simulated: Path | None) -> bytes:
    from cai.attest.anchors import simulated_anchors, vendor_anchors

    return (simulated_anchors(simulated) if simulated else vendor_anchors()).tdx_root


def _described(item: Collateral, root: bytes, now: datetime) -> dict[str, Any]:
    from cai.attest.tdx.signed import verify_collateral

    try:
        verify_collateral(item, root=root, now=now)
        state = "valid"
    except CaiError as error:
        state = error.message
    return {
        "fmspc": item.fmspc, "ca": item.ca, "tcb_eval_data_number": item.eval_data_number,
        "signed": _stamp(item.signed), "expires": _stamp(item.expires),
        "days_left": (item.expires - now).days, "state": state,
        "parts": {
            part: {"issued": _stamp(start), "expires": _stamp(end)}
            for part, (start, end) in item.windows.items()
        },
    }  # fmt: skip


def _stamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _table(items: Any) -> Table:
    table = Table(box=None, padding=(0, 1))
    names = ("fmspc", "ca", "tcb_eval_data_number", "signed", "expires", "days_left")
    for heading in ("FMSPC", "CA", "TCB", "signed", "expires", "days"):
        table.add_column(heading, no_wrap=True)
    table.add_column("state", overflow="fold", min_width=14)
    for item in items:
        table.add_row(*(str(item[name]).removesuffix("Z") for name in names), item["state"])
        for part, window in item["parts"].items():
            end = window["expires"].removesuffix("Z")
            table.add_row("", "", "", part, end, "", "")
    return table


def _write(path: Path, data: bytes) -> None:
    """Replace a file as a whole, so that a reader never sees half of it."""
    from cai.errors import from_os_error

    partial = path.with_name(path.name + ".part")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        raise from_os_error(error, f"write bundle {path}") from error
