"""New session-bound connections a second, when each quote takes 40 ms and none overlap.

With one quote for each of them there would be 25 a second. The agent, the egress and the clients
are processes of their own. A client checks that the proof is about its own session; judging the
quote itself is the work of its own machine, and not what is measured here.

    python -m bench.sessions
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.gateway import agent_for, gateway

QUOTE_S = 0.040
"""How long one quote takes, seconds."""

SESSIONS = 1200
"""New sessions, over all client processes."""

AT_ONCE = 200
"""Most of them at the same time."""

CLIENTS = 2
"""Client processes."""

LIMIT = 20.0
"""How many times what one serial quote each would allow."""


async def serve_agent(work: Path) -> None:
    """The agent, until the process is ended."""
    from cai.host.agent_socket import serve_channel_socket

    server = await serve_channel_socket(agent_for(work, QUOTE_S), work / "channel.sock")
    print("ready", flush=True)
    await server.serve_forever()


async def make_sessions(port: int, count: int, at_once: int) -> None:
    """Make new sessions, each proven and bound, and leave them."""
    from cai.attest.channel import Expectation, Role, check_session
    from cai.attest.verdict import Verdict
    from tng.channel.handshake import Claim
    from tng.channel.link import Link, dial
    from tng.channel.session import prove_session
    from tng.channel.tls import client_context
    from tng.streams import Proven

    context, room = client_context(), asyncio.Semaphore(at_once)

    async def judge(claim: Claim) -> Proven:
        checks, _ = check_session(claim.evidence, claim.leaf, expect=Expectation())
        verdict = Verdict("guest", checks)
        verdict.require()
        return Proven(verdict, 60.0)

    async def one() -> None:
        async with room:
            link = Link(await dial("127.0.0.1", port, context, server_name=""), padding=True)
            await prove_session(link, Role.CLIENT, owes=None, judge=judge)
            link.close()

    await one()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    start = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(count)))
    print(time.perf_counter() - start, flush=True)


@contextmanager
def helper(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """This module as a process, once it is ready."""
    command = [sys.executable, "-m", "bench.sessions", *map(str, arguments)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def measure() -> float:
    """Sessions a second."""
    with tempfile.TemporaryDirectory(prefix="cai-bench-") as name, ExitStack() as stack:
        work = Path(name)
        stack.enter_context(helper("agent", work))
        mode = {"in": {"host": "127.0.0.1", "port": 0}, "out": {"host": "127.0.0.1", "port": 9}}
        attest = {"aa_addr": f"unix://{work}/channel.sock"}
        egress = {"add_egress": [{"mapping": mode, "attest": attest}]}
        port = stack.enter_context(gateway(egress, "egress[0]"))
        each, at_once = SESSIONS // CLIENTS, AT_ONCE // CLIENTS
        clients = [
            stack.enter_context(helper("clients", port, each, at_once)) for _ in range(CLIENTS)
        ]
        for client in clients:
            assert client.stdin is not None
            client.stdin.write("\n")
            client.stdin.flush()
        found = [float(client.stdout.readline()) for client in clients if client.stdout]
    return SESSIONS / max(found)


def main() -> None:
    """Measure and print."""
    with contextlib.suppress(KeyboardInterrupt):
        if sys.argv[1:2] == ["agent"]:
            asyncio.run(serve_agent(Path(sys.argv[2])))
            return
        if sys.argv[1:2] == ["clients"]:
            asyncio.run(make_sessions(*json.loads(f"[{','.join(sys.argv[2:5])}]")))
            return
    rate = measure()
    times = rate * QUOTE_S
    print(
        f"new session-bound connections: {rate:.0f} a second, quotes of {QUOTE_S * 1e3:.0f} ms, "
        f"{times:.0f}x of one serial quote each, target {LIMIT:g}x: "
        f"{'met' if times >= LIMIT else 'MISSED'}"
    )


if __name__ == "__main__":
    main()
