"""What the simulators of key services share: an HTTP server on a loopback port, with faults."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class Fault(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status)
        self.status = status
        self.body = body


class Simulator:
    """Serves ``answer`` on 127.0.0.1 until closed."""

    content_type = "application/json"

    def __init__(self) -> None:
        self.fault: Fault | None = None
        self.requests: list[str] = []
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def start(self) -> None:
        simulator = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                simulator.requests.append(f"{self.command} {self.path}")
                try:
                    if simulator.fault is not None:
                        raise simulator.fault
                    status, body = 200, simulator.answer(self, self.rfile.read(length))
                except Fault as fault:
                    status, body = fault.status, fault.body
                self.send_response(status)
                self.send_header("content-type", simulator.content_type)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = handle_any  # noqa: N815

            def log_message(self, *_: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Nobody answers any more; ``start`` comes back on the same port."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def answer(self, request: BaseHTTPRequestHandler, body: bytes) -> bytes:
        raise NotImplementedError


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()
