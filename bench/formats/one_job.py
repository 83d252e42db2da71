"""One measured job over a sealed model, a process of its own.

    python -m bench.formats.one_job SEALED KEY never|within_size   decrypt it all into a tmpfs
    python -m bench.formats.one_job SEALED KEY first-bytes   open, list, first byte of each
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from cai.loaders import open_tree
from cai.model.tree import EntryType, ModelTree
from cai.mount import system
from cai.mount.pour import Pourer


def pour(tree: ModelTree, huge: str) -> None:
    """Every file into a tmpfs that nobody sees; it goes with this process."""
    files = [entry for entry in tree.entries.values() if entry.type is EntryType.FILE]
    room = sum(entry.size for entry in files) + (64 << 20)
    area = system.DetachedMount(
        "tmpfs", "bench", {"size": str(room), "mode": "0700"}, {"noswap": None, "huge": huge}
    )
    with Pourer(tree, large_pages=huge != "never") as pourer:
        for number, entry in enumerate(files):
            out = os.open(str(number), os.O_RDWR | os.O_CREAT, dir_fd=area.descriptor)
            pourer.pour(entry, out)
            os.close(out)
    area.close()


def first_bytes(sealed: Path, key: Path) -> None:
    """Prints CPU seconds: of the whole process, and without starting Python and its imports."""
    start = time.process_time()
    byte = bytearray(1)
    with open_tree(sealed, key) as tree:
        for path, entry in tree.entries.items():
            if entry.type is EntryType.FILE:
                reader = tree.open(path)
                reader.readinto(0, memoryview(byte))
                reader.close()
    end = time.process_time()
    print(end, end - start)


if __name__ == "__main__":
    sealed, key, what = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    if what == "first-bytes":
        first_bytes(sealed, key)
    else:
        with open_tree(sealed, key) as opened:
            pour(opened, what)
