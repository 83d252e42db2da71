"""Paths inside a tree, with symlinks followed as far as they stay in it."""

from __future__ import annotations

from cai.errors import InputError
from cai.model.tree import EntryType, ModelTree

MAX_LINKS = 40
"""Most symlinks that one path may lead through."""


def resolve(tree: ModelTree, path: str) -> str:
    """The path without symlinks; it need not exist.

    Raises:
        InputError: it leads out of the tree, or through too many links.
    """
    pending = [part for part in reversed(path.split("/")) if part not in ("", ".")]
    done: list[str] = []
    links = 0
    while pending:
        part = pending.pop()
        if part == "..":
            if not done:
                raise InputError(f"{path!r} leads out of the model")
            done.pop()
            continue
        entry = tree.entries.get("/".join([*done, part]))
        if entry is not None and entry.type is EntryType.SYMLINK:
            links += 1
            if links > MAX_LINKS or entry.target.startswith("/"):
                raise InputError(f"{path!r} leads through too many links, or out of the model")
            pending += [step for step in reversed(entry.target.split("/")) if step not in ("", ".")]
            continue
        done.append(part)
    return "/".join(done)
