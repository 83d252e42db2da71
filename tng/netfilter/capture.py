"""The capture rules of one configuration: guard first, then listeners, then capture.

So there is no moment at which what is to be captured can pass in clear, neither at the start nor
after a crash nor after an orderly stop (decisions §7, Fail closed at the port).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from cai.errors import CaiError, SettingError
from tng.config.entries import Config
from tng.config.modes import Netfilter
from tng.netfilter import kernel
from tng.netfilter.ruleset import GUARD, Entry, capture_rules, capture_table, guard_rules
from tng.netfilter.sets import AddressSet, parse_ipset
from tng.operation.journal import Journal

REFRESH_S = 5.0
"""How often the members of ``ipset`` sets are copied again, seconds."""


class Captures:
    """Everything that a configuration captures by netfilter.

    Args:
        config: all of it.
        journal: where its lines go.

    Raises:
        SettingError: an entry asks for cgroups where there are none of version 2.
    """

    def __init__(self, config: Config, journal: Journal) -> None:
        self._journal = journal
        self._refreshing: asyncio.Task[None] | None = None
        self._capturing = False
        self.entries = tuple(
            _entry(item.name, item.mode, egress=egress)
            for egress, items in ((False, config.ingress), (True, config.egress))
            for item in items
            if isinstance(item.mode, Netfilter)
        )
        self.marks = frozenset(entry.mode.so_mark for entry in self.entries)

    def __bool__(self) -> bool:
        return bool(self.entries)

    @property
    def mark(self) -> int | None:
        """Mark of this gateway's own sockets; ``None`` when nothing is captured."""
        return min(self.marks) if self.marks else None

    async def guard(self, ports: Mapping[str, int] | None = None) -> None:
        """Install the guard, which stays.

        Args:
            ports: of the listeners, by entry name, once they are known.

        Raises:
            CaiError: the kernel does not take it, or a set cannot be read.
        """
        known = ports or {}
        entries = []
        for entry in self.entries:
            port = known.get(entry.name, entry.mode.listen_port or 0)
            entries.append(replace(entry, port=port, sets=await _sets_of(entry)))
        self.entries = tuple(entries)
        await kernel.load(guard_rules(self.entries, self.marks))

    async def capture(self, ports: Mapping[str, int]) -> None:
        """Turn connections to the listeners, which are open.

        Raises:
            CaiError: the kernel does not take it, or a set cannot be read.
        """
        await self.guard(ports)
        await kernel.load(capture_rules(self.entries, self.marks))
        self._capturing = True
        if any(entry.sets for entry in self.entries):
            self._refreshing = asyncio.create_task(self._refresh(ports))

    async def release(self) -> None:
        """Take the capture away; the guard stays, so that nothing passes in clear now."""
        if self._refreshing:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        if not self._capturing:
            return
        self._capturing = False
        try:
            await kernel.remove(capture_table(self.entries))
        except CaiError as error:
            self._journal.line(f"netfilter: the capture rules stay: {error.message}")
            return
        self._journal.line(
            f"netfilter: captures no more; table inet {GUARD} still keeps clear text out, "
            "`tng netfilter down` takes it away"
        )

    async def _refresh(self, ports: Mapping[str, int]) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                before = [entry.sets for entry in self.entries]
                now = [await _sets_of(entry) for entry in self.entries]
                if now != before:
                    await self.guard(ports)
                    await kernel.load(capture_rules(self.entries, self.marks))
            except CaiError as error:
                self._journal.line(f"netfilter: an ipset is not followed: {error.message}")


def _entry(name: str, mode: Netfilter, *, egress: bool) -> Entry:
    if mode.listen_port and any(
        item.first_port is not None and item.first_port <= mode.listen_port <= (item.last_port or 0)
        for item in mode.capture
    ):
        raise SettingError(f"{name}: listen_port {mode.listen_port} is one of the captured ports")
    return Entry(
        name,
        mode,
        egress=egress,
        cgroups=tuple(kernel.cgroup(path, f"{name}.capture_cgroup") for path in mode.cgroups),
        not_cgroups=tuple(
            kernel.cgroup(path, f"{name}.nocapture_cgroup") for path in mode.not_cgroups
        ),
    )


async def _sets_of(entry: Entry) -> dict[str, AddressSet]:
    names = {item.ipset for item in entry.mode.capture if item.ipset is not None}
    return {name: parse_ipset(name, await kernel.saved_ipset(name)) for name in sorted(names)}
