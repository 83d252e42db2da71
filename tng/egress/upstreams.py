"""The backends behind one egress: which of them lives, and which has the least to do.

Whether a backend lives is learnt twice: by asking it from time to time (where the entry says what
to ask), and by every connection that fails. One that is down gets no request until it answered
again; when all are down each is tried, because a refused request helps nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from cai.errors import PeerUnreachable
from tng.config.addresses import TcpUpstream, Upstream
from tng.operation.journal import Journal

UPSTREAM_TIMEOUT_S = 5.0
"""Longest wait for the upstream to accept a connection, seconds."""

PROBE_TIMEOUT_S = 5.0
"""Longest wait for the answer to a health check, seconds."""

RETRY_S = 2.0
"""How long an upstream that failed is left alone where nothing asks whether it lives, seconds."""

FULL_QUEUE_S = 0.005
"""Pause before a Unix socket whose queue is full is tried again, seconds."""

MAX_PROBE = 64 * 1024
"""Most bytes that are read of the answer to a health check."""

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, slots=True)
class Probe:
    """What is asked to see whether a backend lives.

    Attributes:
        path: of a GET; any answer below 500 is a living backend.
        interval_s: how often, seconds.
    """

    path: str
    interval_s: float


@dataclass(slots=True)
class _State:
    upstream: Upstream
    up: bool = True
    running: int = 0
    failed_at: float = 0.0
    reason: str = ""


class Lease:
    """One connection to one upstream, counted until it is released.

    Args:
        reader: from the upstream.
        writer: to it.
        release: called once at its end.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        release: Callable[[], None],
    ) -> None:
        self.reader = reader
        self.writer = writer
        self._release: Callable[[], None] | None = release

    def close(self, *, abort: bool = False) -> None:
        """Give the connection up; ``abort`` drops it at once, so that the backend stops working."""
        if self._release is None:
            return
        self._release()
        self._release = None
        if abort:
            self.writer.transport.abort()
        else:
            self.writer.close()


class Upstreams:
    """The backends of one listening port.

    Args:
        name: of the entry, for the log.
        targets: at least one.
        journal: where its lines go.
        probe: what is asked to see whether they live; ``None`` asks nothing.
        clock: monotonic, seconds.
    """

    def __init__(
        self,
        name: str,
        targets: Sequence[Upstream],
        journal: Journal,
        *,
        probe: Probe | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._states = [_State(target) for target in targets]
        self._journal = journal
        self._probe = probe
        self._clock = clock
        self._turn = 0
        self._asking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to ask whether they live."""
        if self._probe is not None and self._asking is None:
            self._asking = asyncio.create_task(self._ask())

    async def close(self) -> None:
        """Ask no more."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
            self._asking = None

    @property
    def ready(self) -> bool:
        """Whether any of them is believed to live."""
        return any(self._usable(state) for state in self._states)

    def status(self) -> list[dict[str, object]]:
        """What the control interface shows."""
        return [
            {
                "upstream": str(state.upstream),
                "up": state.up,
                "running": state.running,
                **({"reason": state.reason} if not state.up else {}),
            }
            for state in self._states
        ]

    async def connect(self) -> Lease:
        """A connection to the living upstream with the least to do; the next one when it fails.

        Raises:
            PeerUnreachable: none of them answers.
        """
        problem: PeerUnreachable | None = None
        for state in self._order():
            # Counted before it answers, so that many requests at once do not all take the same.
            state.running += 1
            try:
                reader, writer = await connect_upstream(state.upstream)
            except PeerUnreachable as error:
                state.running -= 1
                self._down(state, error.message)
                problem = problem or error
            except BaseException:
                state.running -= 1
                raise
            else:
                if self._probe is None:
                    self._up(state)
                return Lease(reader, writer, functools.partial(self._released, state))
        raise problem or PeerUnreachable("there is no upstream")

    def _released(self, state: _State) -> None:
        state.running -= 1

    def _order(self) -> list[_State]:
        self._turn += 1
        shift = self._turn % len(self._states)
        turned = self._states[shift:] + self._states[:shift]
        turned.sort(key=lambda state: (not self._usable(state), state.running))
        return turned

    def _usable(self, state: _State) -> bool:
        if state.up:
            return True
        return self._probe is None and self._clock() - state.failed_at >= RETRY_S

    def _down(self, state: _State, reason: str) -> None:
        state.failed_at = self._clock()
        state.reason = reason
        if state.up:
            state.up = False
            self._journal.line(f"{self._name} upstream {state.upstream} is down: {reason}")

    def _up(self, state: _State) -> None:
        if not state.up:
            state.up, state.reason = True, ""
            self._journal.line(f"{self._name} upstream {state.upstream} is back")

    async def _ask(self) -> None:
        assert self._probe is not None  # noqa: S101 - by the caller
        while True:
            await asyncio.gather(*(self._ask_one(state, self._probe) for state in self._states))
            await asyncio.sleep(self._probe.interval_s)

    async def _ask_one(self, state: _State, probe: Probe) -> None:
        try:
            status = await http_status(lambda: connect_upstream(state.upstream), probe.path)
        except PeerUnreachable as error:
            self._down(state, error.message)
            return
        if status >= 500:
            self._down(state, f"its health check answers {status}")
        else:
            self._up(state)


async def connect_upstream(upstream: Upstream) -> Streams:
    """Connect to one upstream.

    Raises:
        PeerUnreachable: it does not accept a connection in time.
    """
    try:
        async with asyncio.timeout(UPSTREAM_TIMEOUT_S):
            if isinstance(upstream, TcpUpstream):
                return await asyncio.open_connection(upstream.host, upstream.port)
            return await _connect_unix(str(upstream.path))
    except (OSError, TimeoutError, UnicodeError) as error:
        raise PeerUnreachable(f"upstream {upstream} does not answer: {error}") from error


async def _connect_unix(path: str) -> Streams:
    """Connect to a Unix socket, whose queue may be full for a moment.

    The kernel answers EAGAIN then, and the socket stays unconnected; asyncio would take that for a
    connection under way, and later for one that stands.
    """
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        found.settimeout(0)
        while True:
            try:
                found.connect(path)
                break
            except BlockingIOError:
                await asyncio.sleep(FULL_QUEUE_S)
        return await asyncio.open_unix_connection(sock=found)
    except BaseException:
        found.close()
        raise


async def http_status(connect: Callable[[], Awaitable[Streams]], path: str) -> int:
    """The status of a GET over a new connection.

    Raises:
        PeerUnreachable: there is no answer of HTTP.
    """
    writer = None
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            reader, writer = await connect()
            writer.write(
                f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()
            )
            line = await reader.readline()
            parts = line.split(b" ", 2)
            if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or len(parts[1]) != 3:
                raise PeerUnreachable("its health check is not answered by HTTP")
            # An orderly end spares the backend's log a broken pipe.
            await reader.read(MAX_PROBE)
            return int(parts[1])
    except (OSError, TimeoutError, ValueError) as error:
        raise PeerUnreachable("its health check is not answered") from error
    finally:
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()
