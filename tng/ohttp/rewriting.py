"""The outer path of a request: what a load balancer sees instead of the real one."""

from __future__ import annotations

import re

from tng.config.transport import OhttpClient
from tng.peers.destination import BadRequest

MAX_PATH = 8 * 1024
"""Longest path that is matched and sent outside, bytes."""

_GROUP = re.compile(r"\$(?:\$|([0-9A-Za-z_]+)|\{([^}]*)\})")
_PATH = re.compile(r"/[\x21\x22\x24-\x7e]*")


def outer_path(settings: OhttpClient, target: bytes) -> str:
    """The outer path for an inner request target.

    Args:
        settings: rewrites and default.
        target: path and query; the query never goes outside.

    Raises:
        BadRequest: the path is too long, or what comes of it cannot be sent.
    """
    path = target.partition(b"?")[0].decode("latin-1")
    if len(path) > MAX_PATH:
        raise BadRequest(f"the path is longer than {MAX_PATH} bytes")
    for rule in settings.rewrites:
        match = rule.pattern.fullmatch(path)
        if match:
            return _checked(_expand(match, rule.substitution))
    return _checked(path) if settings.keep_path else "/"


def fetch_paths(settings: OhttpClient) -> tuple[str, ...]:
    """Outer paths at which to ask for a key before there is a request: one key per origin.

    The root, then the fixed part of each rewrite, for load balancers that know only those.
    """
    fixed = (rule.substitution.partition("$")[0] for rule in settings.rewrites)
    return tuple(dict.fromkeys(("/", *(path for path in fixed if _PATH.fullmatch(path)))))


def _expand(match: re.Match[str], substitution: str) -> str:
    """Fill in ``$1``, ``$name``, ``${name}``, ``$$`` as Rust's ``regex`` does; absent is empty."""

    def value(found: re.Match[str]) -> str:
        if found.group(0) == "$$":
            return "$"
        name = found.group(1) or found.group(2) or ""
        try:
            return match[int(name) if name.isdigit() else name] or ""
        except (IndexError, ValueError, OverflowError):
            return ""

    return _GROUP.sub(value, substitution)


def _checked(path: str) -> str:
    if not _PATH.fullmatch(path) or len(path) > MAX_PATH:
        raise BadRequest("the outer path that the settings make of this request cannot be sent")
    return path
