"""Rules for names and symbolic links of a tree (docs/spec-format.md §5.2).

Names out of a manifest are data from outside, as much as those of a source directory: both pass
through here before anything touches a file system.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cai.errors import FormatError

MAX_PATH = 4096
"""Most bytes of a path or a link's target."""

MAX_PART = 255
"""Most bytes of one part of a path."""

MAX_LINKS = 40
"""Most links that are followed in one resolution, as Linux does (path_resolution(7))."""


def name_bytes(text: str, *, any_bytes: bool = True) -> bytes:
    """A path's or target's bytes; with ``any_bytes`` those that are not UTF-8 may be escaped.

    Raises:
        UnicodeEncodeError: it stands for no bytes that are allowed.
    """
    return text.encode("utf-8", "surrogateescape" if any_bytes else "strict")


def path_fault(path: str, *, any_bytes: bool = False) -> str | None:
    """Why this is not a path of a tree, or ``None`` when it is one.

    Args:
        path: the path.
        any_bytes: names need not be UTF-8, as in gocryptfs trees (surrogate escapes).
    """
    try:
        encoded = name_bytes(path, any_bytes=any_bytes)
    except UnicodeEncodeError:
        return "not valid UTF-8"
    if not 1 <= len(encoded) <= MAX_PATH:
        return f"{len(encoded)} bytes long, expected 1 to {MAX_PATH}"
    if b"\x00" in encoded:
        return "holds a zero byte"
    for part in encoded.split(b"/"):
        if part in (b"", b".", b".."):
            return "absolute, or with an empty, '.' or '..' part"
        if len(part) > MAX_PART:
            return f"a part is longer than {MAX_PART} bytes"
    return None


def target_fault(target: str, *, any_bytes: bool = False) -> str | None:
    """Why this is not a target that a link of a tree may have, or ``None`` when it is one."""
    try:
        encoded = name_bytes(target, any_bytes=any_bytes)
    except UnicodeEncodeError:
        return "its target is not valid UTF-8"
    if not 1 <= len(encoded) <= MAX_PATH:
        return f"its target is {len(encoded)} bytes long, expected 1 to {MAX_PATH}"
    if b"\x00" in encoded:
        return "its target holds a zero byte"
    if target.startswith("/"):
        return "its target is absolute"
    return None


def parent(path: str) -> str:
    """The path's parent; ``""`` is the root."""
    return path.rpartition("/")[0]


def check_links(links: Mapping[str, str], *, any_bytes: bool = False) -> None:
    """Check that every link stays inside the tree when a kernel resolves it.

    Text alone does not tell: through a link to a directory elsewhere, ``..`` leads elsewhere too.

    Args:
        links: target by path, for every link of the tree.
        any_bytes: targets need not be UTF-8.

    Raises:
        FormatError: naming the link that leads outside or in a circle.
    """
    for path, fault in link_faults(links, any_bytes=any_bytes):
        raise FormatError(f"symbolic link {path!r}: {fault}")


def link_faults(
    links: Mapping[str, str], *, any_bytes: bool = False
) -> Iterator[tuple[str, str]]:
    """Every link that does not stay inside the tree, and why; arguments as ``check_links``."""
    for path in links:
        fault = target_fault(links[path], any_bytes=any_bytes) or _resolution_fault(path, links)
        if fault:
            yield path, fault


def _resolution_fault(path: str, links: Mapping[str, str]) -> str | None:
    where = [part for part in parent(path).split("/") if part]
    rest = links[path].split("/")[::-1]
    followed = 1
    while rest:
        part = rest.pop()
        if part in ("", "."):
            continue
        if part == "..":
            if not where:
                return "it leads out of the tree"
            where.pop()
            continue
        where.append(part)
        target = links.get("/".join(where))
        if target is not None:
            followed += 1
            if followed > MAX_LINKS:
                return f"it leads through more than {MAX_LINKS} links"
            where.pop()
            rest.extend(target.split("/")[::-1])
    return None
