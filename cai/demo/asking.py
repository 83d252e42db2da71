"""The client's side of the demo: requests through the gateway, and what their answers mean."""

from __future__ import annotations

import math
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from cai.demo.parties import Party
from cai.demo.telling import StoryBroken
from cai.errors import PeerError, PeerUnreachable

ANSWER_S = 60.0
"""Longest wait for an answer, seconds; a first request waits for a quote."""

ENGINE_START_S = 170.0
"""Longest time an engine may take to load a model, seconds; vLLM on a CPU takes up to a minute."""

SAME_COSINE = 0.9999
"""Least cosine between another engine's embedding and ours for the same text and weights."""

PAIRS = (
    ("A cat sleeps on the sofa.", "A kitten naps on the couch.", True),
    ("I forgot my password.", "How do I reset my login?", True),
    ("Share prices fell sharply.", "The stock market dropped.", True),
    ("A cat sleeps on the sofa.", "Share prices fell sharply.", False),
    ("I forgot my password.", "The stock market dropped.", False),
    ("How do I reset my login?", "A kitten naps on the couch.", False),
)
"""Sentence pairs, and whether people would call them related."""

SENTENCES = tuple(dict.fromkeys(text for first, second, _ in PAIRS for text in (first, second)))
"""Each sentence once, in the order of the request."""


@dataclass(frozen=True, slots=True)
class Similarity:
    """One pair and the cosine of the angle between its embeddings."""

    first: str
    second: str
    related: bool
    cosine: float

    def to_json(self) -> dict[str, Any]:
        """The pair as a member of the document."""
        return {
            "first": self.first, "second": self.second, "related": self.related,
            "cosine": round(self.cosine, 4),
        }


def over_socket(uds: Path, path: str) -> dict[str, Any]:
    """GET a JSON document from the engine's Unix socket.

    Raises:
        PeerUnreachable, PeerError: as ``_document``.
    """
    transport = httpx.HTTPTransport(uds=str(uds))
    with httpx.Client(transport=transport, base_url="http://engine", timeout=ANSWER_S) as client:
        return _document(client, "GET", path)


def until_answered(party: Party, uds: Path, path: str) -> dict[str, Any]:
    """GET a JSON document from a Unix socket as soon as its party answers.

    Raises:
        PartyEnded, PeerUnreachable: the party ends, or takes longer than ``ENGINE_START_S``.
    """

    def look() -> dict[str, Any] | None:
        try:
            return over_socket(uds, path)
        except PeerError:
            return None

    return party.wait(look, seconds=ENGINE_START_S)


def listens(port: int) -> bool:
    """Whether somebody listens at a loopback port."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def embed(proxy: str, url: str, model: str, texts: Sequence[str]) -> list[list[float]]:
    """POST an embedding request through an HTTP proxy, as any OpenAI client does.

    Args:
        proxy: address of the client's gateway.
        url: base address of the service, e.g. ``http://127.0.0.1:8080``.
        model: name of the served model.
        texts: what is embedded.

    Returns:
        One embedding a text, in order.

    Raises:
        PeerUnreachable, PeerError: as ``_document``; the gateway's reason is in the message.
    """
    body = {"model": model, "input": list(texts)}
    with httpx.Client(proxy=proxy, base_url=url, trust_env=False, timeout=ANSWER_S) as client:
        answer = _document(client, "POST", "/v1/embeddings", json=body)
    try:
        found = sorted(answer["data"], key=lambda item: int(item["index"]))
        vectors = [[float(number) for number in item["embedding"]] for item in found]
    except (KeyError, TypeError, ValueError) as error:
        raise PeerError("the engine's answer is no list of embeddings") from error
    if len(vectors) != len(texts):
        raise PeerError(f"asked for {len(texts)} embeddings, got {len(vectors)}")
    return vectors


def client_verdict(control: str, peer: str) -> dict[str, Any]:
    """What the client's gateway last thought of a peer, from its control interface.

    Args:
        control: base address of the control interface.
        peer: ``host:port`` as the request named it.

    Raises:
        PeerUnreachable, PeerError: the gateway does not say.
    """
    with httpx.Client(base_url=control, trust_env=False, timeout=ANSWER_S) as client:
        status = _document(client, "GET", "/status")
    for entry in dict(status.get("ingress") or {}).values():
        verdict = entry.get("peers", {}).get(peer, {}).get("verdict")
        if isinstance(verdict, dict):
            return verdict
    raise PeerError(f"the client's gateway has no verdict on {peer}")


def similarities(vectors: Sequence[Sequence[float]]) -> list[Similarity]:
    """The cosine of every pair of ``PAIRS``.

    Args:
        vectors: embeddings of ``SENTENCES``.

    Raises:
        StoryBroken: some related pair is not nearer than every unrelated one.
    """
    by_text = dict(zip(SENTENCES, vectors, strict=True))
    found = [
        Similarity(first, second, related, cosine(by_text[first], by_text[second]))
        for first, second, related in PAIRS
    ]
    nearest = max(item.cosine for item in found if not item.related)
    farthest = min(item.cosine for item in found if item.related)
    if not farthest > nearest:
        raise StoryBroken(
            f"related sentences come out at {farthest:.2f}, unrelated ones at {nearest:.2f}",
            hint="the served model does not embed as the published one does",
        )
    return found


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Cosine of the angle between two vectors; 0 when one of them is zero."""
    length = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(x * x for x in b))
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / length if length else 0.0


def reason_of(response: httpx.Response) -> str:
    """The reason that an error answer gives, in one line."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if isinstance(body, dict):
        inner = body.get("error", body)
        for name in ("message", "detail", "reason"):
            if isinstance(inner, dict) and isinstance(inner.get(name), str):
                return str(inner[name])
        if isinstance(inner, str):
            return inner
    return " ".join(response.text.split())[:400] or response.reason_phrase


def _document(client: httpx.Client, method: str, path: str, **options: Any) -> dict[str, Any]:
    try:
        response = client.request(method, path, **options)
    except httpx.HTTPError as error:
        raise PeerUnreachable(f"{method} {path}: {error or type(error).__name__}") from error
    if response.status_code != 200:
        raise PeerError(f"{method} {path}: {response.status_code} {reason_of(response)}")
    try:
        value = response.json()
    except ValueError as error:
        raise PeerError(f"{method} {path}: the answer is not JSON") from error
    if not isinstance(value, dict):
        raise PeerError(f"{method} {path}: the answer is not a JSON object")
    return value
