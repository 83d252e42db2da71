"""One line for each thing that happened, on stderr; never a path, a header or a body of a request.

Names and addresses come from outside, so everything that is not printable is replaced.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TextIO

MAX_LINE = 600
"""Longest line that is written, characters."""


class Journal:
    """Writes lines.

    Args:
        out: where to; by default the process's stderr at the time of writing.
    """

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out

    def line(self, text: str) -> None:
        """Write one line with its time."""
        clean = "".join(char if char.isprintable() else "?" for char in text)
        if len(clean) > MAX_LINE:
            clean = clean[: MAX_LINE - 1] + "…"
        stamp = datetime.now(UTC).strftime("%H:%M:%S")
        out = self._out or sys.stderr
        try:
            out.write(f"tng: {stamp} {clean}\n")
            out.flush()
        except (OSError, ValueError):
            # A full or closed log may not stop the traffic; there is nowhere left to say so.
            return


def endpoint_text(address: object) -> str:
    """A socket address as ``host:port`` or a Unix path."""
    if isinstance(address, tuple) and len(address) >= 2:
        host, port = str(address[0]), address[1]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return str(address or "local")
