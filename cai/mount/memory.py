"""Memory for decrypted files: how much there is, and file systems in it that no path leads to.

No byte of them touches a disk: they are mounted ``noswap``, and where the kernel cannot promise
that, a machine with swap is refused. Large pages are asked for, which makes filling and reading
several times faster.
"""

from __future__ import annotations

import re
from pathlib import Path

from cai.errors import NoSpace, StorageError
from cai.mount import device, system
from cai.mount.index import TreeIndex

INODE_COST = 4096
"""Memory reserved for each path beside its content, bytes."""

RESERVE = 256 * 1024 * 1024
"""Memory that must stay free beside the model, bytes."""

_GROUPS = Path("/sys/fs/cgroup")


def needed(index: TreeIndex) -> int:
    """Bytes that a whole tree takes when it is decrypted."""
    return index.total + len(index.nodes) * INODE_COST


def fits(size: int) -> bool:
    """Whether that many bytes can be taken and the reserve stays; unknown counts as yes."""
    bound = available()
    return bound is None or size + RESERVE <= bound


def check(size: int) -> None:
    """Refuse what does not fit.

    Raises:
        NoSpace: it does not.
    """
    bound = available()
    if bound is not None and size + RESERVE > bound:
        raise NoSpace(
            f"the model needs {size >> 20} MiB of memory beside a reserve of {RESERVE >> 20}, "
            f"{bound >> 20} MiB are available",
            hint="use --kind fuse, which keeps only what is being read",
        )


def area(size: int, inodes: int) -> system.DetachedMount:
    """An empty tmpfs that is nowhere in the tree.

    Args:
        size: most bytes that it may hold.
        inodes: most files and directories.

    Raises:
        StorageError: the kernel refused, or could swap it to a disk.
    """
    made = system.DetachedMount(
        "tmpfs",
        device.TMPFS_SOURCE,
        {"size": str(size), "mode": "0700", "nr_inodes": str(inodes)},
        # A file gets large pages as far as they lie within its size: "always" would give each
        # small file a whole one.
        {"noswap": None, "huge": "within_size"},
    )
    if "noswap" in made.refused and swap_is_on():
        made.close()
        raise StorageError(
            "this kernel could swap the decrypted model to a disk",
            hint="swapoff -a, or use --kind fuse",
        )
    return made


def has_large_pages(made: system.DetachedMount) -> bool:
    """Whether the kernel took the wish for large pages."""
    return "huge" not in made.refused


def available() -> int | None:
    """Bytes that this process may still take: the machine's, or its control group's if less."""
    bounds = []
    machine = _meminfo("MemAvailable")
    if machine is not None:
        bounds.append(machine)
    lines = _text("/proc/self/cgroup")
    group = re.search(r"^0::(/.*)$", lines, re.MULTILINE)
    if group:
        bounds += _group_bounds(_GROUPS, group[1], "memory.max", "memory.current")
    group = re.search(r"^\d+:(?:[^:]*,)?memory(?:,[^:]*)?:(/.*)$", lines, re.MULTILINE)
    if group:
        bounds += _group_bounds(
            _GROUPS / "memory", group[1], "memory.limit_in_bytes", "memory.usage_in_bytes"
        )
    return min(bounds, default=None)


def is_tight(size: int) -> bool:
    """Whether that many bytes can only be had by giving up cached pages of other files."""
    free = _meminfo("MemFree")
    return free is not None and size + RESERVE > free


def swap_is_on() -> bool:
    """Whether this machine has a swap area."""
    return len(_text("/proc/swaps").splitlines()) > 1


def _group_bounds(top: Path, path: str, limit_name: str, used_name: str) -> list[int]:
    """What is left of the limits of a control group and of those above it."""
    bounds = []
    folder = top / path.strip("/")
    for at in (folder, *folder.parents):
        limit, used = _text(at / limit_name).strip(), _text(at / used_name).strip()
        if limit.isdigit() and used.isdigit():
            bounds.append(max(0, int(limit) - int(used)))
        if at == top:
            break
    return bounds


def _meminfo(name: str) -> int | None:
    found = re.search(rf"^{name}:\s*(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
