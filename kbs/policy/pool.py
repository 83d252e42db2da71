"""A few processes that evaluate Rego for every request of a broker (see ``kbs.policy.worker``).

A process that takes too long is killed and another one takes its place at the next request. What
comes back is text; nothing that a process says is trusted to be more than an answer of its policy.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Any, cast

from cai import jcs
from cai.errors import CaiError, FormatError, LimitExceeded
from kbs.policy.settings import PolicySettings
from kbs.policy.worker import MAX_FRAME

MAX_USES = 10_000
"""A process ends after this many requests, so that nothing can pile up in it."""

START_SECONDS = 30
"""How long a process may take to start, seconds; the first request pays for it."""

WATCH_SECONDS = 0.02
"""How often the memory of a busy process is looked at, seconds."""

_LENGTH = 4
_PAGE = resource.getpagesize()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a policy answered.

    Attributes:
        values: rule to its JSON value; a rule that is undefined is not in it.
        problem: what went wrong, or empty; then there are no values.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a policy is made of.

    Attributes:
        rules: every rule and function, as a dotted path that begins with its package.
        calls: built-in functions that it calls anywhere.
        absent: those among them that the engine does not have.
        redefines: it adds to the prelude's function, or to what is under its name.
        problem: why it does not compile, or empty.
    """

    rules: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    redefines: bool = False
    problem: str = ""


class RegoPool:
    """Evaluates policies in processes of their own; safe to use from several threads.

    Args:
        settings: numbers and limits. Processes start when they are needed first.
    """

    def __init__(self, settings: PolicySettings | None = None) -> None:
        self._settings = settings or PolicySettings()
        self._free = threading.BoundedSemaphore(self._settings.workers)
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._closed = False

    def evaluate(
        self,
        text: str,
        rules: tuple[str, ...],
        *,
        data: Mapping[str, Any],
        input: Mapping[str, Any],  # noqa: A002 - Rego's word for it
    ) -> Evaluation:
        """Evaluate rules of ``package policy``.

        Args:
            text: the policy.
            rules: names of rules.
            data: base document.
            input: input document.

        Returns:
            The values, or what went wrong; never an exception for anything that a policy does.
        """
        # As canonical JSON: the engine does not decode \u escapes, and RFC 8785 has none outside
        # control characters.
        answer = self._ask(
            {
                "do": "evaluate",
                "text": text,
                "rules": list(rules),
                "data": jcs.canonical(dict(data)).decode("utf-8"),
                "input": jcs.canonical(dict(input)).decode("utf-8"),
            }
        )
        values, problem = answer.get("values"), answer.get("problem")
        if problem or not isinstance(values, dict):
            return Evaluation(problem=str(problem or "no answer"))
        return Evaluation(values)

    def inspect(self, text: str) -> Inspection:
        """Compile a policy and say what it is made of."""
        answer = self._ask({"do": "inspect", "text": text})
        if answer.get("problem"):
            return Inspection(problem=str(answer["problem"]))
        try:
            return Inspection(
                tuple(answer["rules"]),
                tuple(answer["calls"]),
                tuple(answer["absent"]),
                bool(answer["redefines"]),
            )
        except (KeyError, TypeError, ValueError):
            return Inspection(problem="no answer")

    def close(self) -> None:
        """End every process."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.kill()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps(request).encode("ascii")
        if len(body) > MAX_FRAME:
            return {"problem": "policy and input are too long"}
        if not self._free.acquire(timeout=self._settings.wait_limit_s):
            return {"problem": "too many evaluations are waiting"}
        try:
            worker = self._take()
            try:
                answer = worker.ask(body, time.monotonic() + self._settings.time_limit_s)
            except _WorkerFailed as error:
                worker.kill()
                return {"problem": str(error)}
            except BaseException:
                worker.kill()
                raise
            self._put_back(worker)
            return answer
        finally:
            self._free.release()

    def _take(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise CaiError("the policy processes are closed")
            if self._idle:
                return self._idle.pop()
        return _Worker(self._settings)

    def _put_back(self, worker: _Worker) -> None:
        with self._lock:
            if worker.uses < MAX_USES and not self._closed:
                self._idle.append(worker)
                return
        worker.kill()


class _WorkerFailed(Exception):
    """The process did not answer; the text says why."""


class _Worker:
    """One process."""

    def __init__(self, settings: PolicySettings) -> None:
        self.uses = 0
        self._process = subprocess.Popen(
            [
                sys.executable, "-I", "-m", "kbs.policy.worker",
                str(settings.time_limit_s), str(settings.memory_limit_mib),
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={}, cwd="/", close_fds=True, start_new_session=True, bufsize=0,
        )  # fmt: skip
        self._memory = settings.memory_limit_mib * 1024 * 1024
        self._input = cast("IO[bytes]", self._process.stdin)
        self._output = cast("IO[bytes]", self._process.stdout)
        os.set_blocking(self._input.fileno(), False)
        os.set_blocking(self._output.fileno(), False)

    def ask(self, body: bytes, until: float) -> dict[str, Any]:
        """Send a request and read the answer.

        Raises:
            _WorkerFailed: not in time, or the process ended.
        """
        if self.uses == 0:
            # Its first request also pays for the start of the process.
            until += START_SECONDS
        self.uses += 1
        try:
            self._send(len(body).to_bytes(_LENGTH, "big") + body, until)
            size = int.from_bytes(self._receive(_LENGTH, until), "big")
            if size > MAX_FRAME:
                raise _WorkerFailed("the answer is too long")
            value = jcs.parse(self._receive(size, until), what="policy answer", limit=MAX_FRAME)
        except OSError as error:
            raise _WorkerFailed("the evaluation ended its process") from error
        except (FormatError, LimitExceeded) as error:
            raise _WorkerFailed("the answer is not JSON") from error
        if not isinstance(value, dict):
            raise _WorkerFailed("the answer is not JSON")
        return value

    def kill(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._input.close()
        self._output.close()

    def _wait(self, stream: IO[bytes], event: int, until: float) -> None:
        """Wait for a pipe, and watch meanwhile what the process uses."""
        with selectors.DefaultSelector() as selector:
            selector.register(stream, event)
            while not selector.select(min(WATCH_SECONDS, max(0.0, until - time.monotonic()))):
                if time.monotonic() >= until:
                    raise _WorkerFailed("the evaluation took too long")
                if self._resident() > self._memory:
                    raise _WorkerFailed("the evaluation needs too much memory")

    def _resident(self) -> int:
        """Memory that the process uses, bytes; 0 when it is gone."""
        try:
            with open(f"/proc/{self._process.pid}/statm", "rb") as file:  # noqa: PTH123 - hot
                return int(file.read().split()[1]) * _PAGE
        except (OSError, IndexError, ValueError):
            return 0

    def _send(self, data: bytes, until: float) -> None:
        view = memoryview(data)
        while view:
            self._wait(self._input, selectors.EVENT_WRITE, until)
            view = view[os.write(self._input.fileno(), view) :]

    def _receive(self, size: int, until: float) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            self._wait(self._output, selectors.EVENT_READ, until)
            part = os.read(self._output.fileno(), size - len(parts))
            if not part:
                raise _WorkerFailed("the evaluation ended its process")
            parts += part
        return bytes(parts)
