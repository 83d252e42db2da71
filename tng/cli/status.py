"""``tng status``: what a running gateway thinks of its peers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cai import terminal as terminals
from cai.errors import PeerError, PeerUnreachable, UsageError
from cai.terminal import JsonFlag

if TYPE_CHECKING:
    from rich.table import Table

DEFAULT_URL = "http://127.0.0.1:50000"
"""Control interface of TNG's own examples."""

TIMEOUT_S = 20.0
"""Longest wait for the control interface, seconds; it may have to ask for a proof."""

MAX_ANSWER = 16 * 1024 * 1024
"""Longest answer that is read, bytes."""

NOT_READY = 10
"""Exit status of a gateway that is not ready."""


def status(
    url: Annotated[
        str,
        typer.Option("--url", envvar="TNG_CONTROL_URL", help="Its control_interface."),
    ] = DEFAULT_URL,
    json_output: JsonFlag = False,
) -> None:
    """Show a running gateway's peers and verdicts: exit status 0 ready, 10 not ready."""
    import json

    base = url.rstrip("/")
    if not base.startswith(("http://", "https://")):
        raise UsageError(f"{url!r} is not a URL", hint=f"as in {DEFAULT_URL}")
    _status, body = _get(f"{base}/status", base)
    code, told = _get(f"{base}/readyz?verbose", base)
    try:
        found = json.loads(body)
        assert isinstance(found, dict)  # noqa: S101 - turned into an error below
    except (ValueError, AssertionError) as error:
        raise PeerError(f"{base} is not the control interface of a gateway") from error
    missing = [line for line in told.decode("utf-8", "replace").splitlines()[1:] if line]
    value = {**found, "ready": code == 200, "missing": missing}
    terminal = terminals.current()
    terminal.result(value, _table(value))
    if not terminal.json_output:
        for reason in missing:
            terminal.say(f"not ready: {reason}")
        for name in value.get("unsafe", []):
            terminal.say(f"loosened: {name}")
    if code != 200:
        raise typer.Exit(NOT_READY)


def _get(url: str, base: str) -> tuple[int, bytes]:
    import httpx

    try:
        # trust_env off: an http_proxy variable may point at the very gateway that is asked.
        with (
            httpx.Client(trust_env=False, timeout=TIMEOUT_S) as client,
            client.stream("GET", url) as response,
        ):
            body = b""
            for piece in response.iter_bytes():
                body += piece
                if len(body) > MAX_ANSWER:
                    raise PeerError(f"{base} answers with more than {MAX_ANSWER} bytes")
            return response.status_code, body
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise PeerUnreachable(
            f"no gateway answers at {base}: {error}",
            hint="give the address of its control_interface with --url",
        ) from error


def _table(value: dict[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1))
    for heading in ("entry", "peer", "state", "verdict", "at", "why"):
        table.add_column(heading, overflow="fold")
    for name, entry in _members(value, "ingress"):
        peers = _members(entry, "peers")
        if not peers:
            table.add_row(name, "-", "no peer yet", "", "", "")
        for where, peer in peers:
            verdict = peer.get("verdict") or {}
            error = peer.get("error") or {}
            passed = verdict.get("verdict") == "pass" and not error
            mark = Text(str(verdict.get("verdict", "none")), style="green" if passed else "red")
            if verdict.get("simulated"):
                mark.append(" SIMULATED", style="yellow")
            state = "connected" if peer.get("connected") else "no channel"
            why = f"{error.get('code')}: {error.get('message')}" if error else _scope(verdict)
            table.add_row(name, Text(where), state, mark, str(peer.get("at", "")), Text(why))
    for name, entry in _members(value, "egress"):
        state = f"{entry.get('sessions', 0)} sessions, {entry.get('streams', 0)} streams"
        table.add_row(name, "-", state, "", "", "")
    return table


def _scope(verdict: dict[str, Any]) -> str:
    checks = verdict.get("checks")
    count = len(checks) if isinstance(checks, list) else 0
    return f"{count} checks, binding {verdict.get('binding', 'none')}"


def _members(value: dict[str, Any], name: str) -> list[tuple[str, dict[str, Any]]]:
    found = value.get(name)
    if not isinstance(found, dict):
        return []
    return [(str(key), item) for key, item in found.items() if isinstance(item, dict)]
