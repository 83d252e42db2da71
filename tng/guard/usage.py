"""What a request used, read out of the backend's answer as it passes.

An answer is one JSON document or a stream of events (``text/event-stream``). Streams pass event by
event; the one that only the gateway asked for, with the usage and no choice, is taken out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

MAX_ANSWER = 64 * 1024 * 1024
"""Longest JSON answer whose usage is read, bytes; longer ones pass uncounted."""

MAX_EVENT = 8 * 1024 * 1024
"""Longest event that is looked into, bytes."""


@dataclass(slots=True)
class Usage:
    """Tokens of one request.

    Attributes:
        prompt: of the prompt.
        completion: of the answer.
        told: whether the backend counted them, else they are the events that passed.
    """

    prompt: int = 0
    completion: int = 0
    told: bool = False

    def take(self, value: Any) -> None:
        """Take a ``usage`` object of any dialect."""
        if not isinstance(value, dict):
            return
        prompt = value.get("prompt_tokens", value.get("input_tokens"))
        completion = value.get("completion_tokens", value.get("output_tokens"))
        if type(prompt) is int and prompt >= 0:
            self.prompt = max(prompt, self.prompt if self.told else 0)
        if type(completion) is int and completion >= 0:
            self.completion = max(completion, self.completion if self.told else 0)
        self.told = self.told or type(prompt) is int or type(completion) is int


class PlainAnswer:
    """Watches an answer that is not a stream; all bytes pass as they are."""

    def __init__(self, usage: Usage) -> None:
        self._usage = usage
        self._parts: list[bytes] = []
        self._size = 0

    def passes(self, data: bytes) -> bytes:
        """What of these bytes goes on."""
        self._size += len(data)
        if self._size <= MAX_ANSWER:
            self._parts.append(data)
        else:
            self._parts.clear()
        return data

    def rest(self) -> bytes:
        """What goes on at the end."""
        if self._parts:
            self._usage.take(_member(b"".join(self._parts)))
        return b""


class EventAnswer:
    """Watches a stream of events; each passes as soon as it is whole.

    Args:
        usage: where the count goes.
        drop_usage: whether the event with the usage and no choice is taken out.
    """

    def __init__(self, usage: Usage, *, drop_usage: bool) -> None:
        self._usage = usage
        self._drop = drop_usage
        self._held = b""

    def passes(self, data: bytes) -> bytes:
        """What of these bytes goes on."""
        self._held += data
        out: list[bytes] = []
        while (end := _event_end(self._held)) > 0:
            event, self._held = self._held[:end], self._held[end:]
            if not self._watch(event):
                out.append(event)
        if len(self._held) > MAX_EVENT:
            out.append(self._held)
            self._held = b""
        return b"".join(out)

    def rest(self) -> bytes:
        """What goes on at the end."""
        held, self._held = self._held, b""
        return held

    def _watch(self, event: bytes) -> bool:
        """Count an event; whether it is to be taken out."""
        if not self._usage.told:
            self._usage.completion += b"data:" in event and b"[DONE]" not in event
        if b'"usage"' not in event:
            return False
        data = b"\n".join(
            line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")
        )
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return False
        if not isinstance(value, dict):
            return False
        usage = value.get("usage")
        for name in ("response", "message"):
            inner = value.get(name)
            if usage is None and isinstance(inner, dict):
                usage = inner.get("usage")
        self._usage.take(usage)
        return self._drop and value.get("choices") == [] and isinstance(usage, dict)


def _event_end(data: bytes) -> int:
    """Where the first event ends, its empty line included; 0 when it is not whole."""
    ends = [end + len(mark) for mark in (b"\n\n", b"\r\n\r\n") if (end := data.find(mark)) >= 0]
    return min(ends, default=0)


def _member(data: bytes) -> Any:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value.get("usage") if isinstance(value, dict) else None
