"""The mark of the gateway's own connections, by which the capture rules let them pass.

It is set where the event loop connects, so that no part of the gateway, and no library that it
uses, can forget it and be captured by its own rules.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

SO_MARK = getattr(socket, "SO_MARK", 36)


def mark_connections(loop: asyncio.AbstractEventLoop, mark: int) -> None:
    """Mark every TCP socket that this loop connects from now on.

    Args:
        loop: of this process.
        mark: ``SO_MARK``; setting it needs CAP_NET_ADMIN, and connecting fails without.
    """
    connect = loop.sock_connect

    async def marked(sock: socket.socket, address: Any) -> None:
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
        await connect(sock, address)

    loop.sock_connect = marked  # type: ignore[method-assign]
