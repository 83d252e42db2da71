"""Several key brokers as processes on one database, and clients that only know how to retry."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.kbs.world import URI, Visitor

CLIENT_SECONDS = 60
"""How long a client tries before it gives up."""

PAUSE = 0.05
"""Longest pause between two tries of a client, seconds."""


class Replica:
    """One ``kbs serve``."""

    def __init__(self, cwd: Path, *arguments: str | Path, env: dict[str, str]) -> None:
        cwd.mkdir(exist_ok=True)
        self.errors = cwd / "errors.txt"
        command = [sys.executable, "-m", "kbs", "serve", "--json", "--listen", "127.0.0.1:0",
                   "--admin-listen", "127.0.0.1:0", *map(str, arguments)]  # fmt: skip
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                command, cwd=cwd, stdout=subprocess.PIPE, stderr=errors, text=True,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **env},
            )  # fmt: skip
        self.ready: dict[str, Any] = {}

    def wait(self) -> None:
        """Until it listens."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.said()
        self.ready = json.loads(line)

    @property
    def url(self) -> str:
        return str(self.ready["listening"])

    def said(self) -> str:
        return self.errors.read_text("utf-8", "replace")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@dataclass
class Client:
    """A guest behind a load balancer: each of its requests goes to some replica.

    It knows two remedies: send the same request again, and begin again with ``auth``.
    """

    visitor: Visitor
    urls: list[str]
    chance: random.Random
    request_ids: list[str] = field(default_factory=list)
    again: int = 0
    started: int = 0

    def key(self) -> bytes:
        """The resource, whatever it takes."""
        until = time.monotonic() + CLIENT_SECONDS
        with httpx.Client(trust_env=False, timeout=30) as http:
            while time.monotonic() < until:
                self.started += 1
                found = self._handshake(http, until)
                if found is not None:
                    return found
                self.again += 1
                time.sleep(PAUSE * self.chance.random())
        raise AssertionError(f"no key after {self.started} handshakes")

    def _handshake(self, http: httpx.Client, until: float) -> bytes | None:
        begun = self._send(
            http, "POST", "auth", until,
            json={"version": "0.4.0", "tee": "tdx", "extra-params": {}},
        )  # fmt: skip
        if begun is None:
            return None
        cookie = {"Cookie": f"kbs-session-id={begun.cookies['kbs-session-id']}"}
        http.cookies.clear()
        body = self.visitor.body(begun.json()["nonce"])
        if self._send(http, "POST", "attest", until, content=body, headers=cookie) is None:
            return None
        given = self._send(http, "GET", f"resource/{URI}", until, headers=cookie)
        return None if given is None else self.visitor.open(given)

    def _send(
        self, http: httpx.Client, method: str, path: str, until: float, **more: Any
    ) -> httpx.Response | None:
        """The answer; ``None`` when only a new handshake helps."""
        while time.monotonic() < until:
            try:
                answer = http.request(
                    method, f"{self.chance.choice(self.urls)}/kbs/v0/{path}", **more
                )
            except httpx.TransportError:
                answer = None
            if answer is not None and answer.status_code == 200:
                self.request_ids.append(answer.headers["x-request-id"])
                return answer
            if answer is not None and answer.status_code < 500:
                assert answer.status_code == 401, answer.text
                return None
            self.again += 1
            time.sleep(PAUSE * self.chance.random())
        return None
