"""``python -m cai.attest.sim``: make a simulated platform, renew what expires, play its vendors.

Verbs: ``create DIR [--seed TEXT]``, ``renew DIR [--tcb-status STATUS] [--advisory ID …]
[--revoke NAME …]``, ``serve DIR``.
"""

from __future__ import annotations

import argparse
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

from cai.attest.sim import CollateralSettings, OcspSettings, SimulatedPlatform
from cai.attest.sim.tcb import EVAL_DATA_NUMBER, REVOCABLE
from cai.errors import CaiError


def main(arguments: list[str]) -> int:
    """Run one command.

    Returns:
        The exit status.
    """
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as error:
        return int(error.code or 0)
    try:
        return _run(options)
    except CaiError as error:
        print(f"error: {error.message}", file=sys.stderr)  # noqa: T201 - a developers' tool
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)  # noqa: T201
        return error.exit_status


def _run(options: argparse.Namespace) -> int:
    now = datetime.now(UTC)
    if options.command == "create":
        seed = None if options.seed is None else options.seed.encode()
        platform = SimulatedPlatform.create(options.directory, now=now, seed=seed)
        # Whoever knows a given seed has the keys, so it is said once more.
        note = "" if seed is None else ", repeatable: its keys follow from the seed"
        print(f"SIMULATED platform: private {platform.directory}, public {platform.anchors}{note}")  # noqa: T201
        return 0
    platform = SimulatedPlatform.load(options.directory)
    if options.command == "serve":
        return _serve(platform)
    intel = tuple(name for name in options.revoke if name in REVOCABLE)
    settings = CollateralSettings(
        tcb_status=options.tcb_status,
        advisory_ids=tuple(options.advisory),
        eval_data_number=options.eval_data_number,
        revoked=intel,
    )
    platform.renew_collateral(now=now, settings=settings)
    gpu = {name: "revoked" for name in options.revoke if name not in REVOCABLE}
    platform.renew_answers(now=now, settings=OcspSettings(status=gpu))
    print(f"SIMULATED platform: private {platform.directory}, public {platform.anchors}")  # noqa: T201
    return 0


def _serve(platform: SimulatedPlatform) -> int:
    from cai.attest.sim.endpoints import SimulatedVendors

    with SimulatedVendors(platform) as vendors:
        print(f"SIMULATED PCS, RIM service and OCSP responder at {vendors.url}", flush=True)  # noqa: T201
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cai.attest.sim", description="A simulated TDX platform with GPUs."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create", help="make a platform in DIR")
    create.add_argument("--seed", help="makes it repeatable; whoever knows it has the keys")
    renew = commands.add_parser("renew", help="write collateral and revocation answers anew")
    renew.add_argument("--tcb-status", default="UpToDate", help="status of the platform's level")
    renew.add_argument("--advisory", action="append", default=[], help="e.g. INTEL-SA-01099")
    renew.add_argument("--eval-data-number", type=int, default=EVAL_DATA_NUMBER)
    renew.add_argument(
        "--revoke", action="append", default=[],
        help=f"{', '.join(REVOCABLE)}, or the common name of an NVIDIA certificate",
    )  # fmt: skip
    serve = commands.add_parser("serve", help="answer as PCS, RIM service and OCSP responder")
    for command in (create, renew, serve):
        command.add_argument("directory", type=Path, metavar="DIR")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
