"""``make bench``: run every measurement of this folder, one after another."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import bench


def main() -> None:
    """Run the modules of the package that have a ``main``."""
    wanted = set(sys.argv[1:])
    for found in pkgutil.iter_modules(bench.__path__):
        if found.name.startswith("_") or (wanted and found.name not in wanted):
            continue
        module = importlib.import_module(f"bench.{found.name}")
        if hasattr(module, "main"):
            print(f"== {found.name}")
            sys.argv = [found.name]
            module.main()


if __name__ == "__main__":
    main()
