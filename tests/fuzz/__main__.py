"""``python -m tests.fuzz TARGET [atheris options]``: real, coverage-guided fuzzing."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

try:
    import atheris
except ImportError:
    sys.exit("atheris is not installed: pip install cai-confidential[fuzz]")

with atheris.instrument_imports(include=["cai"]):
    from tests.fuzz.targets import TARGETS, corpus, survives


def main() -> None:
    """Fuzz one target from its corpus until it breaks or a limit is reached."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in TARGETS:
        sys.exit(f"usage: python -m tests.fuzz TARGET [-runs=N]; targets: {', '.join(TARGETS)}")
    with TemporaryDirectory() as directory:
        for number, data in enumerate(corpus(name)):
            Path(directory, str(number)).write_bytes(data)
        arguments = [sys.argv[0], *sys.argv[2:], directory]
        atheris.Setup(arguments, lambda data: survives(TARGETS[name], data))
        atheris.Fuzz()


main()
