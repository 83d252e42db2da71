"""Act 6: what must not work, tried for real, each with the reason that was given.

A refusal that does not refuse breaks the story, and so does one for another reason than its own:
each names the words that its reason must hold.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from cai.demo import asking, visitor
from cai.demo.parties import Finished
from cai.demo.recipe import HOST_UP
from cai.demo.stage import Stage
from cai.demo.telling import Act, StoryBroken
from cai.errors import PeerError, Refused, Tampered

LISTENING = "0A"
"""State of a listening socket in the kernel's tables."""

LOOPBACK = (
    "0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F",
)
"""127.0.0.1, ::1 and ::ffff:127.0.0.1 as the kernel's tables write them."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """One thing that was refused.

    Attributes:
        name: stable, for machines.
        what: what was tried.
        by: who refused.
        reason: in that party's own words.
        simulated: the refusal rests on simulated evidence.
    """

    name: str
    what: str
    by: str
    reason: str
    simulated: bool = False

    def to_json(self) -> dict[str, Any]:
        """The refusal as a member of the document."""
        return {
            "name": self.name, "what": self.what, "by": self.by, "reason": self.reason,
            "refused": True, "simulated": self.simulated,
        }


def refuse(stage: Stage, act: Act) -> None:
    """Try everything that must be refused."""
    found: list[Refusal] = []
    for play in (
        other_measurement, debug_guest, replayed_quote, replayed_under_new_nonce, flipped_bit,
        flipped_bit_read, peer_without_evidence, plain_request,
    ):
        with stage.tell.waiting("trying what must not work"):
            refusal = play(stage)
        stage.tell.refused(refusal.what, f"{refusal.by}: {refusal.reason}",
                           simulated=refusal.simulated)
        found.append(refusal)
    act.simulated = True
    act.facts = {"refusals": [refusal.to_json() for refusal in found]}


def must_be_refused(finished: Finished, *, words: Sequence[str] = ()) -> str:
    """The reason of a command that must have ended with "refused" (exit status 7).

    Raises:
        StoryBroken: it ended in another way, or its reason holds none of ``words``.
    """
    return _must_end(finished, Refused.exit_status, words)


def other_measurement(stage: Stage) -> Refusal:
    """A guest with another image asks for the key."""
    reason = _host_refused(stage, "other-image", "--unsafe-simulated-image", "another")
    return Refusal(
        "other-measurement", "a guest whose measurement differs", "key broker",
        _holds(reason, "mr_td", "measurement"), simulated=True,
    )


def debug_guest(stage: Stage) -> Refusal:
    """A debug guest, whose memory its host can read, asks for the key."""
    reason = _host_refused(stage, "debug", "--unsafe-simulated-debug")
    return Refusal(
        "debug-guest", "a debug guest", "key broker", _holds(reason, "debug"), simulated=True
    )


def replayed_quote(stage: Stage) -> Refusal:
    """The bytes of a genuine attestation, sent again in another session."""
    reason = visitor.replay(stage.kbs_url, _captured(stage), rewrite_nonce=False)
    return Refusal(
        "replayed-quote", "a replayed quote", "key broker", _holds(reason, "nonce"), simulated=True
    )


def replayed_under_new_nonce(stage: Stage) -> Refusal:
    """The same evidence under the new session's nonce."""
    reason = visitor.replay(stage.kbs_url, _captured(stage), rewrite_nonce=True)
    return Refusal(
        "replayed-quote-new-nonce", "the same quote under the new session's nonce", "key broker",
        _holds(reason, "report_data", "report data", "nonce"), simulated=True,
    )


def flipped_bit(stage: Stage) -> Refusal:
    """One bit of the ciphertext is flipped; ``cai check`` looks at it."""
    flipped = _flip_one_bit(stage)
    command = ["cai", "check", "flipped", "--key-file", "model.key", "--json"]
    stage.tell.command(command)
    finished = stage.parties.run("check-flipped", command)
    reason = _must_end(finished, Tampered.exit_status, [flipped.name])
    return Refusal("flipped-bit", "one bit flipped in the ciphertext", "cai check", reason)


def flipped_bit_read(stage: Stage) -> Refusal:
    """The same ciphertext, mounted and read."""
    place = stage.work / "mnt-flipped"
    place.mkdir(mode=0o700)
    command = [
        "cai", "mount", "flipped", "mnt-flipped", "--key-file", "model.key", "--foreground",
        "--json", *(["--kind", "tmpfs"] if stage.mount_kind == "tmpfs" else []),
    ]
    stage.tell.command(command)
    what = "reading that part through the mount"
    if stage.mount_kind == "tmpfs":
        # Materialising reads everything, so there is no mount to read from.
        finished = stage.parties.run("mount-flipped", command)
        return Refusal("flipped-bit-read", what, "cai mount",
                       _must_end(finished, Tampered.exit_status, []))
    party = stage.parties.start("mount-flipped", command)
    party.wait_document(lambda value: "kind" in value)
    failed = [path for path in sorted(place.rglob("*")) if path.is_file() and _gives_eio(path)]
    stage.parties.stop(party)
    if len(failed) != 1:
        raise StoryBroken(f"one file was to give EIO, {len(failed)} did")
    name = failed[0].relative_to(place)
    return Refusal(
        "flipped-bit-read", what, "the mount", f"{name}: {os.strerror(errno.EIO)}, no wrong byte"
    )


def peer_without_evidence(stage: Stage) -> Refusal:
    """The client's gateway is pointed at an ordinary server."""
    with _ordinary_server() as (port, seen):
        try:
            asking.embed(stage.proxy_url, f"http://127.0.0.1:{port}", stage.model.name, ["hello"])
        except PeerError as error:
            reason = error.message.removeprefix("POST /v1/embeddings: ")
        else:
            raise StoryBroken("the client's gateway sent a request to a peer without evidence")
        if seen:
            raise StoryBroken("the request reached a peer that had proved nothing")
    return Refusal(
        "peer-without-evidence", "a server that proves nothing about itself",
        "the client's gateway",
        _holds(reason, "evidence", "prove", "cai/1", "TLS"),
    )


def plain_request(stage: Stage) -> Refusal:
    """An ordinary request straight to the gateway's port on the host."""
    what = "a plain request to the gateway's port"
    try:
        with httpx.Client(trust_env=False, timeout=asking.ANSWER_S) as client:
            answer = client.get(f"{stage.service_url}/v1/models")
    except httpx.TransportError as error:
        reason = f"closed without a word ({error or type(error).__name__})"
        return Refusal("plain-request", what, "the host's gateway", reason)
    if answer.status_code < 400:
        raise StoryBroken(f"{what} was answered with {answer.status_code}")
    return Refusal("plain-request", what, "the host's gateway", asking.reason_of(answer))


def tcp_listeners(session: int) -> list[str]:
    """TCP ports on which the processes of a session listen (proc(5): fd, net/tcp).

    Args:
        session: its leader's process id; each party has a session of its own.

    Returns:
        ``loopback:PORT`` or ``any:PORT`` for each, sorted.
    """
    sockets: set[str] = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getsid(int(entry.name)) == session:
                sockets |= {str(link.readlink()) for link in (entry / "fd").iterdir()}
        except OSError:
            continue  # it has just ended
    found = []
    for table in ("tcp", "tcp6"):
        for row in Path("/proc/self/net", table).read_text().splitlines()[1:]:
            words = row.split()
            if words[3] == LISTENING and f"socket:[{words[9]}]" in sockets:
                address, _, port = words[1].partition(":")
                where = "loopback" if address in LOOPBACK else "any"
                found.append(f"{where}:{int(port, 16)}")
    return sorted(found)


def _host_refused(stage: Stage, name: str, *options: str) -> str:
    command = [*HOST_UP, *options]
    command[command.index("run")] = f"run-{name}"
    stage.tell.command(command)
    finished = stage.parties.run(f"host-{name}", command)
    return must_be_refused(finished).removeprefix("key broker: ")


def _must_end(finished: Finished, status: int, words: Sequence[str]) -> str:
    if finished.status != status:
        raise StoryBroken(
            f"a command was to end with status {status}, it ended with {finished.status}",
            hint=finished.err.strip().splitlines()[-1][:400] if finished.err.strip() else None,
        )
    error = finished.document().get("error")
    message = error.get("message") if isinstance(error, dict) else None
    if not isinstance(message, str):
        raise StoryBroken("a command was refused without a reason")
    return _holds(message, *words)


def _holds(reason: str, *words: str) -> str:
    if words and not any(word.lower() in reason.lower() for word in words):
        raise StoryBroken(f"refused, but for another reason than its own: {reason}")
    return reason


def _captured(stage: Stage) -> bytes:
    launch = (stage.work / "launch.json").read_bytes()
    return visitor.capture(stage.kbs_url, stage.work / "sim", launch)


def _flip_one_bit(stage: Stage) -> Path:
    """Copy the sealed model without copying bytes, then flip a bit in its largest object."""
    copy = stage.work / "flipped"
    shutil.copytree(stage.work / "sealed", copy, copy_function=os.link)
    largest = max((copy / "objects").iterdir(), key=lambda path: path.stat().st_size)
    data = largest.read_bytes()
    place = len(data) // 2
    largest.unlink()  # the name only: the sealed model keeps its own bytes
    with largest.open("xb") as file:
        file.write(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    return largest


def _gives_eio(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            while file.read(1 << 20):
                pass
    except OSError as error:
        if error.errno != errno.EIO:
            raise StoryBroken(f"reading {path.name}: {error.strerror}, expected EIO") from error
        return True
    return False


@contextmanager
def _ordinary_server() -> Iterator[tuple[int, list[str]]]:
    """A plain HTTP server that would answer anything, and what requests it has seen."""
    seen: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_arguments: object) -> None:
            """Requests are none of the terminal's business."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield int(server.server_address[1]), seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
