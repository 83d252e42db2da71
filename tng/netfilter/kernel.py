"""The edge to the kernel: ``nft``, ``ipset``, and what kind of cgroups there are."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path, PurePosixPath

from cai.errors import ListenerFailed, SettingError
from tng.netfilter.ruleset import CAPTURE, GUARD, Cgroup

COMMAND_TIMEOUT_S = 20.0
"""Longest run of ``nft`` or ``ipset``, seconds."""

CGROUP_ROOT = Path("/sys/fs/cgroup")
"""Where cgroup v2 is mounted, and where nft looks paths up."""

MAX_DEPTH = 32
"""Deepest cgroup, directories."""


async def load(rules: str) -> None:
    """Hand rules to the kernel, all or none.

    Raises:
        ListenerFailed: it does not take them.
    """
    await _run("nft", "-f", "-", given=rules)


async def tables() -> tuple[str, ...]:
    """Names of this product's tables.

    Raises:
        ListenerFailed: nft cannot be run.
    """
    names = []
    for line in (await _run("nft", "list", "tables", "inet")).splitlines():
        name = line.removeprefix("table inet ").strip()
        if name == GUARD or name.startswith(CAPTURE):
            names.append(name)
    return tuple(names)


async def shown() -> str:
    """This product's tables as nft prints them.

    Raises:
        ListenerFailed: nft cannot be run.
    """
    return "".join([await _run("nft", "list", "table", "inet", name) for name in await tables()])


async def remove(*names: str) -> None:
    """Take tables away; one that is not there is fine.

    Raises:
        ListenerFailed: the kernel does not let it.
    """
    if names:
        await load("".join(f"add table inet {n}\ndelete table inet {n}\n" for n in names))


async def saved_ipset(name: str) -> str:
    """What ``ipset save`` tells of a set.

    Raises:
        SettingError: there is no such set, or no ipset.
    """
    try:
        return await _run("ipset", "save", name)
    except ListenerFailed as error:
        raise SettingError(
            f"ipset {name} cannot be read: {error.message}", hint=f"ipset list {name}"
        ) from error


def cgroup(text: str, where: str, root: Path = CGROUP_ROOT) -> Cgroup:
    """A cgroup of the configuration, as a path below the root of cgroup v2.

    Raises:
        SettingError: this machine has cgroup v1 there, or no such cgroup.
    """
    if not (root / "cgroup.controllers").is_file():
        raise SettingError(
            f"{where}: capturing by cgroup needs cgroup v2 at {root}; this machine has cgroup v1 "
            "or none there",
            hint="boot with systemd.unified_cgroup_hierarchy=1, or capture by capture_dst",
        )
    path = PurePosixPath(text.removeprefix(str(root)).strip("/"))
    parts = path.parts
    bad = any(part == ".." or '"' in part or not part.isprintable() for part in parts)
    if bad or not 1 <= len(parts) <= MAX_DEPTH:
        raise SettingError(f"{where}: {text!r} is not a cgroup below {root}")
    if not (root / path).is_dir():
        raise SettingError(f"{where}: there is no cgroup {root / path}")
    return Cgroup(str(path), len(parts))


async def _run(*command: str, given: str = "") -> str:
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise ListenerFailed(
            f"netfilter needs the program {command[0]}: {error.strerror}",
            hint=f"install {'nftables' if command[0] == 'nft' else command[0]}",
        ) from error
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT_S):
            out, complaint = await process.communicate(given.encode())
    except TimeoutError as error:
        raise ListenerFailed(f"{command[0]} does not end") from error
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        lines = complaint.decode("utf-8", "replace").strip().splitlines() or ["no reason told"]
        denied = any("not permitted" in line for line in lines)
        raise ListenerFailed(
            f"{command[0]}: {lines[0][:300]}",
            hint="netfilter needs root or CAP_NET_ADMIN; http_proxy and `tng exec` do not"
            if denied
            else "",
        )
    return out.decode("utf-8", "replace")
