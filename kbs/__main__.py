"""``python -m kbs`` is the console script ``kbs``."""

from kbs.cli import main

main()
