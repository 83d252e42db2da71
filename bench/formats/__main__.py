"""``python -m bench.formats``."""

from __future__ import annotations

from bench.formats.run import main

main()
