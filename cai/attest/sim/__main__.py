"""``python -m cai.attest.sim create DIR``: make a simulated platform; ``renew`` its collateral."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

from cai.attest.sim import SimulatedPlatform
from cai.errors import CaiError

USAGE = "usage: python -m cai.attest.sim create|renew DIR"


def main(arguments: list[str]) -> int:
    """Run one command.

    Returns:
        The exit status.
    """
    if len(arguments) != 2 or arguments[0] not in ("create", "renew"):
        print(USAGE, file=sys.stderr)  # noqa: T201 - a tool for developers, not a cai verb
        return 2
    directory, now = Path(arguments[1]), datetime.now(UTC)
    try:
        if arguments[0] == "create":
            platform = SimulatedPlatform.create(directory, now=now)
        else:
            platform = SimulatedPlatform.load(directory)
            platform.renew_collateral(now=now)
    except CaiError as error:
        print(f"error: {error.message}", file=sys.stderr)  # noqa: T201
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)  # noqa: T201
        return error.exit_status
    print(f"SIMULATED platform: private {platform.directory}, public {platform.anchors}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
