"""Guests that ask a key broker for a key, as a process of their own.

``python -m bench._guests PLATFORM COUNT GPUS URL…`` waits for a line on stdin, makes COUNT whole
handshakes one after another and prints the seconds that the broker took for each of them, without
those in which the guest made its evidence.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import httpx

from cai.attest.rcar import TeeKey
from cai.attest.sim import SimulatedPlatform
from tests.kbs.world import SECRET_TEXT, URI, Visitor


def handshake(http: httpx.Client, url: str, visitor: Visitor) -> float:
    """One handshake; returns the seconds of its three requests."""
    spent = 0.0

    def send(method: str, path: str, **more: object) -> httpx.Response:
        nonlocal spent
        start = time.perf_counter()
        answer = http.request(method, f"{url}/kbs/v0/{path}", **more)  # type: ignore[arg-type]
        spent += time.perf_counter() - start
        assert answer.status_code == 200, answer.text
        return answer

    request = {"version": "0.4.0", "tee": "tdx", "extra-params": {}}
    nonce = send("POST", "auth", json=request).json()["nonce"]
    send("POST", "attest", content=visitor.body(nonce))
    assert visitor.open(send("GET", f"resource/{URI}")) == SECRET_TEXT
    http.cookies.clear()
    return spent


def main() -> None:
    """Say ready, wait for the start, work, report."""
    directory, count, gpus, *urls = sys.argv[1:]
    platform = SimulatedPlatform.load(Path(directory))
    visitor = Visitor(platform, gpus=int(gpus), key=TeeKey.generate())
    with httpx.Client(trust_env=False, timeout=60) as http:
        handshake(http, urls[0], visitor)
        print("ready", flush=True)
        sys.stdin.readline()
        times = [
            handshake(http, urls[number % len(urls)], visitor) for number in range(int(count))
        ]
    print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main()
