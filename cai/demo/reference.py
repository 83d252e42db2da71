"""Writes the policy that names exactly one guest: the demo's own.

The owner measures a guest once, where the owner trusts what runs, and writes its values down. This
program does so with the simulated platform: it takes a quote and GPU reports, verifies them
against the simulator's roots, and writes the measurements as ``policy.toml``.

    python -m cai.demo.reference --launch launch.json --sim sim --output policy.toml
"""

from __future__ import annotations

import secrets
import sys
from datetime import UTC, datetime
from hashlib import sha384
from pathlib import Path
from typing import Annotated

import typer

from cai.attest.anchors import simulated_anchors
from cai.attest.evidence import Evidence
from cai.attest.facts import Facts
from cai.attest.policy import policy_for
from cai.attest.statement import stock_report_data
from cai.attest.tdx.collateral import load_collateral
from cai.attest.tdx.runtime_events import launch_events
from cai.attest.verify import verify_evidence
from cai.demo.recipe import write_new
from cai.errors import EvidenceRefused
from cai.settings import read_settings_file
from cai.terminal import JsonFlag, current, run_app


def reference_facts(sim: Path, launch: bytes) -> Facts:
    """What verification establishes of the simulated guest that this ``launch.json`` starts.

    Args:
        sim: directory made by ``python -m cai.attest.sim create``.
        launch: exact bytes of ``launch.json``.

    Raises:
        EvidenceRefused: the simulator's own evidence does not verify.
    """
    # Deferred: production images delete the simulator.
    from cai.attest.sim import GuestSettings, SimulatedPlatform

    platform = SimulatedPlatform.load(sim / "platform")
    guest = platform.guest(GuestSettings(rtmr3_events=launch_events(launch)))
    nonce = secrets.token_bytes(32)
    report_data = stock_report_data(sha384(nonce).digest())
    evidence = Evidence(
        guest.quote(report_data), platform.devices().collect(nonce), guest.event_log()
    )
    verdict, facts = verify_evidence(
        evidence,
        subject="reference guest",
        report_data=report_data,
        gpu_nonce=nonce,
        anchors=simulated_anchors(sim / "anchors"),
        collateral=load_collateral(sim / "anchors" / "collateral"),
        now=datetime.now(UTC),
    )
    verdict.require()
    if facts is None:
        raise EvidenceRefused("the reference guest has no facts", verdict=verdict)
    return facts


def write(
    launch: Annotated[Path, typer.Option(help="launch.json of the guest.")],
    sim: Annotated[Path, typer.Option(help="Directory of the simulated platform.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where policy.toml is written.")],
    json_output: JsonFlag = False,  # noqa: ARG001, FBT002 - run_app reads it
) -> None:
    """Write a policy that names exactly the simulated guest of this launch.json."""
    encoded = read_settings_file(launch, what="launch file")
    # Nothing measures this guest's root disk, so it cannot be `sealed`; `operated` stays a residual
    # risk in every verdict (docs/threat-model.md §4).
    policy = policy_for(
        reference_facts(sim, encoded), profile="operated",
        launch_digest=sha384(encoded).hexdigest(),
    )
    write_new(output, policy.decode("utf-8"))
    current().result({"policy": str(output), "simulated": True}, f"wrote {output} [SIMULATED]")


def main() -> None:
    """Entry point of ``python -m cai.demo.reference``."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(write)
    sys.exit(run_app("reference", app))


if __name__ == "__main__":
    main()
