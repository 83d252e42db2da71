"""``cai collateral gpu``: NVIDIA's reference files and revocation answers, fetched for offline use.

Both expire: reference files after about two years, answers within days. Run it on a schedule.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from cai.errors import UsageError
from cai.terminal import JsonFlag, current

if TYPE_CHECKING:
    from cai.attest.evidence import DeviceEvidence

INCOMPLETE = 20
"""Exit status when something could not be had; the rest is written."""


def gpu(
    evidence: Annotated[
        list[Path],
        typer.Option("--evidence", help="Evidence of a guest with the GPUs; may be repeated."),
    ],
    rims: Annotated[
        Path | None, typer.Option("--rims", help="Directory for reference measurements.")
    ] = None,
    ocsp: Annotated[
        Path | None, typer.Option("--ocsp", help="Directory for revocation answers.")
    ] = None,
    rim_service: Annotated[
        str, typer.Option("--rim-service", help="Base URL of the service of reference files.")
    ] = "https://rim.attestation.nvidia.com",
    responder: Annotated[
        str, typer.Option("--responder", help="URL of the OCSP responder.")
    ] = "https://ocsp.ndis.nvidia.com",
    unsafe_simulated_root: Annotated[
        Path | None,
        typer.Option(
            "--unsafe-simulated-root", help="Anchors of a simulated platform; never for real hosts."
        ),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Fetch what verifying these GPUs asks for, verify it, and write it into directories.

    Exit status 20 when something could not be had; everything else is written all the same.
    """
    import httpx

    from cai.attest.anchors import simulated_anchors, vendor_anchors
    from cai.attest.gpu.fetch import GpuSource, fetch_for
    from cai.cli.verify import time_of

    if rims is None and ocsp is None:
        raise UsageError("nowhere to write to", hint="give --rims DIR, --ocsp DIR or both")
    devices = [device for path in evidence for device in _devices(path)]
    if not devices:
        raise UsageError("there is no GPU in this evidence")
    anchors = simulated_anchors(unsafe_simulated_root) if unsafe_simulated_root else None
    anchors = anchors or vendor_anchors()
    if anchors.rim_root is None:
        raise UsageError("these simulated anchors have no root of reference measurements")
    with httpx.Client(follow_redirects=False) as client:
        fetched = fetch_for(
            client, GpuSource(rim_service, responder), devices, root=anchors.gpu_root,
            rim_root=anchors.rim_root, now=time_of(""),
        )  # fmt: skip
    fetched.save(rims, ocsp)
    body = {
        "rims": sorted(fetched.rims), "answers": len(fetched.answers),
        "missing": list(fetched.missing),
    }  # fmt: skip
    lines = [f"reference file {name}" for name in sorted(fetched.rims)]
    lines.append(f"{len(fetched.answers)} revocation answers")
    lines += [f"MISSING {text}" for text in fetched.missing]
    current().result(body, Text("\n".join(lines)))
    if fetched.missing:
        raise typer.Exit(INCOMPLETE)


def _devices(path: Path) -> tuple[DeviceEvidence, ...]:
    from cai.attest.evidence_file import MAX_EVIDENCE_FILE, decode_evidence
    from cai.errors import from_os_error

    try:
        with path.open("rb") as file:
            data = file.read(MAX_EVIDENCE_FILE + 1)
    except OSError as error:
        raise from_os_error(error, f"read evidence {path}") from error
    return decode_evidence(data, where=str(path)).evidence.devices
