"""Listening sockets: addresses, binding, and who may be reached without TLS."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from cai.errors import ListenerFailed, UsageError

UNIX = "unix:"
"""What an address of a Unix socket begins with."""

SOCKET_MODE = 0o600
"""Mode of a Unix socket: its owner only."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen.

    Attributes:
        host: name or IP address; empty for a Unix socket.
        port: 0 takes a free one.
        path: of a Unix socket; ``None`` for TCP.
    """

    host: str = ""
    port: int = 0
    path: Path | None = None

    @property
    def is_private(self) -> bool:
        """Only this machine can reach it."""
        return self.path is not None or is_loopback(self.host)

    @classmethod
    def parse(cls, text: str, option: str) -> Address:
        """Read ``HOST:PORT`` or ``unix:PATH``.

        Raises:
            UsageError: another form.
        """
        if text.startswith(UNIX):
            path = text.removeprefix(UNIX)
            if not path or "\x00" in path:
                raise UsageError(f"{option} {text!r}: expected unix:PATH")
            return cls(path=Path(path))
        return cls(*parse_address(text, option))


def parse_address(text: str, option: str) -> tuple[str, int]:
    """Read ``HOST:PORT``; an IPv6 address stands in brackets.

    Raises:
        UsageError: another form.
    """
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    number = int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else -1
    if not colon or not host or not 0 <= number <= 65535:
        raise UsageError(f"{option} {text!r}: expected HOST:PORT", hint="e.g. 127.0.0.1:8080")
    return host, number


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on this host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_listener(address: Address) -> socket.socket:
    """A listening socket.

    Raises:
        ListenerFailed: the address is in use or not ours.
    """
    if address.path is not None:
        return bind_unix(address.path)
    return bind(address.host, address.port)


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket.

    Raises:
        ListenerFailed: the address is in use or not ours.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ListenerFailed(f"cannot listen on {host}:{port}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        raise ListenerFailed(
            f"cannot listen on {host}:{port}: {error.strerror}", hint="choose another port"
        ) from error
    return listener


def bind_unix(path: Path) -> socket.socket:
    """A listening Unix socket that only its owner can connect to (0600).

    A socket that a dead process left behind is replaced; one that answers is not.

    Raises:
        ListenerFailed: something else is there, or it cannot be made.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        path.chmod(SOCKET_MODE)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        raise ListenerFailed(f"cannot listen on {path}: {error.strerror or error}") from error
    except ListenerFailed:
        listener.close()
        raise
    return listener


def close_listener(listener: socket.socket) -> None:
    """Close a listening socket; a Unix socket's name goes with it."""
    name = listener.getsockname() if listener.family == socket.AF_UNIX else ""
    listener.close()
    if name:
        with contextlib.suppress(OSError):
            Path(name).unlink()


def url_of(listener: socket.socket, *, tls: bool) -> str:
    """Where a listener is, as a client names it."""
    if listener.family == socket.AF_UNIX:
        return f"{UNIX}{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenerFailed(f"cannot listen on {path}: it is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise ListenerFailed(f"cannot listen on {path}: somebody listens there already")
