"""``python -m tng`` is the console script ``tng``."""

from tng.cli import main

main()
