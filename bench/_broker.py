"""``kbs`` with a stop watch around the verification of evidence.

``python -m bench._broker REPORT serve …`` writes ``{"count", "seconds"}`` of CPU time to REPORT
when it ends, so that the share of verification is measured where everything else is.
"""

from __future__ import annotations

import atexit
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from kbs.cli import main
from kbs.protocol.verifier import Verifier


def watch(report: Path) -> None:
    """Time every verification of this process."""
    verify, lock, totals = Verifier.attestation, threading.Lock(), [0, 0.0]

    def timed(*arguments: Any, **named: Any) -> Any:
        start = time.thread_time()
        try:
            return verify(*arguments, **named)
        finally:
            with lock:
                totals[0] += 1
                totals[1] += time.thread_time() - start

    Verifier.attestation = timed  # type: ignore[method-assign]
    atexit.register(
        lambda: report.write_text(json.dumps({"count": totals[0], "seconds": totals[1]}))
    )


if __name__ == "__main__":
    watch(Path(sys.argv.pop(1)))
    main()
