"""What is told of one request or tunnel: from whom, to whom, how it ended; nothing of its content.

Neither path nor query is told: both can hold words of a person.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Access:
    """One request, tunnel or stream that ended.

    Attributes:
        entry: ``ingress[N]`` or ``egress[N]``.
        what: method, or ``tunnel``, ``stream``.
        client: where it came from.
        peer: where it went.
        status: HTTP status, or a word.
        elapsed_ms: from its start to its end.
        sent: bytes to the peer; ``None`` where nobody counted.
        received: bytes from the peer.
        attested: how the peer was proven; empty when it was not.
        caller: name of an API token or key, never the token.
        error: machine code of what ended it; empty when nothing did.
        message: the same for people.
    """

    entry: str
    what: str
    client: str = ""
    peer: str = ""
    status: int | str = ""
    elapsed_ms: int = 0
    sent: int | None = None
    received: int | None = None
    attested: str = ""
    caller: str = ""
    error: str = ""
    message: str = ""

    def text(self) -> str:
        """One line for people."""
        way = " ".join(part for part in (self.entry, self.client, self.what, self.peer) if part)
        end = f"{self.status}" if self.status != "" else "done"
        if self.error:
            end += f" {self.error}: {self.message}"
        parts = [f"{way} -> {end}"]
        if self.sent is not None:
            parts.append(f"{self.sent} B out")
        if self.received is not None:
            parts.append(f"{self.received} B in")
        parts.append(f"{self.elapsed_ms} ms")
        if self.caller:
            parts.append(f"caller {self.caller}")
        if self.attested:
            parts.append(f"attested {self.attested}")
        return ", ".join(parts)

    def to_json(self) -> dict[str, object]:
        """The members that have a value."""
        named = {
            "entry": self.entry, "what": self.what, "client": self.client, "peer": self.peer,
            "status": self.status, "ms": self.elapsed_ms, "sent": self.sent,
            "received": self.received, "attested": self.attested, "caller": self.caller,
            "error": self.error, "message": self.message,
        }  # fmt: skip
        return {name: value for name, value in named.items() if value not in ("", None)}
