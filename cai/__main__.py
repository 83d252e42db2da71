"""``python -m cai`` is the console script ``cai``."""

from cai.cli import main

main()
