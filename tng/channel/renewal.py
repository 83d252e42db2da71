"""Proofs of a running session: asked for in time, answered in time (spec-channel §4.3).

A session opens streams until the earliest of three moments: the evidence behind it is too old, the
admission ticket ends, or ``MAX_SESSION_AGE_S`` have passed since its last proof. Well before that
the verifier asks for the next one, with new nonces and the next number. Where it does not come or
does not pass, no stream is opened any more, and running ones end after their drain.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine

from cai.attest.agent_client import Busy, ProofRequest
from cai.errors import CaiError, FormatError, PeerUnreachable
from tng.channel.frames import Frame, FrameType
from tng.channel.handshake import Claim
from tng.channel.link import Link
from tng.channel.session import Proofs

MAX_SESSION_AGE_S = 15 * 60.0
"""How long a session may open streams after a proof, seconds; equal to the age of GPU evidence."""

RENEW_FRACTION = 0.6
"""Part of that time after which the next proof is asked for."""

MAX_PROOFS_A_MINUTE = 6
"""Most proofs that one session may ask this end for in a minute."""

MAX_DRAIN_S = 300.0
"""Longest time in which running streams may end, seconds (decisions §5)."""

RETRY_S = 2.0
"""Pause before an agent that is busy or away is asked again, seconds."""

MAX_TRIES = 10
"""How often it is asked for one proof of a running session."""


class Renewal:
    """The further proofs of one session, in both directions.

    Args:
        link: of the session.
        proofs: its first proofs, done.
        leave: called when the session may open no stream any more.

    Attributes:
        tasks: what is under way.
    """

    def __init__(self, link: Link, proofs: Proofs, leave: Callable[[], None]) -> None:
        self._link = link
        self._proofs = proofs
        self._leave = leave
        self._asked: deque[float] = deque()
        self._waiting = False
        self._failed_at: float | None = None
        self.tasks: set[asyncio.Task[None]] = set()
        now = _now()
        self._taken_until = self._renew_at = float("inf")
        self._given_until = float("inf")
        self._took(now)
        if proofs.owes is not None:
            self._gave(now)

    @property
    def expires(self) -> float:
        """When the session opens no stream any more, by the event loop's clock."""
        if self._failed_at is not None:
            return self._failed_at
        return min(self._taken_until, self._given_until)

    @property
    def ends(self) -> float:
        """When its running streams end."""
        proven = self._proofs.proven
        return self.expires + (MAX_DRAIN_S if proven is None else min(proven.drain_s, MAX_DRAIN_S))

    def look(self, now: float) -> None:
        """Ask for the next proof when it is time."""
        verifier = self._proofs.verifier
        if verifier is None or self._waiting or now < self._renew_at:
            return
        self._waiting = True
        self._link.send_soon(Frame(FrameType.PROVE, 0, verifier.prove()))

    def take(self, frame: Frame) -> None:
        """Take a frame of a proof.

        Raises:
            FormatError: it is out of turn.
        """
        if frame.type is FrameType.PROVE:
            self._on_prove(frame.payload)
            return
        verifier = self._proofs.verifier
        if verifier is None:
            raise FormatError(f"{frame.type.name} frame for nobody")
        if frame.type is FrameType.ACK:
            verifier.on_ack(frame.payload)
        else:
            self._start(self._judge(verifier.on_evidence(frame.payload)))

    def _on_prove(self, prove: bytes) -> None:
        now = _now()
        if self._proofs.prover is None:
            raise FormatError("PROVE to an end that proves nothing")
        while self._asked and self._asked[0] <= now - 60:
            self._asked.popleft()
        if len(self._asked) >= MAX_PROOFS_A_MINUTE:
            raise FormatError(f"more than {MAX_PROOFS_A_MINUTE} proofs asked for in a minute")
        self._asked.append(now)
        self._start(self._answer(self._proofs.answer(self._link, prove, renewal=True)))

    async def _answer(self, request: ProofRequest) -> None:
        try:
            await self._give(request)
        except CaiError:
            # Whether it is refused or broken: no lease, no new stream.
            self._leave()
        else:
            self._gave(_now())

    async def _give(self, request: ProofRequest) -> None:
        for attempt in range(1, MAX_TRIES + 1):
            try:
                await self._proofs.give(self._link, request)
            except (Busy, PeerUnreachable):
                if attempt == MAX_TRIES:
                    raise
                await asyncio.sleep(RETRY_S)
            else:
                return

    async def _judge(self, claim: Claim) -> None:
        try:
            await self._proofs.take(claim)
        except CaiError:
            self._failed_at = _now()
            self._leave()
        else:
            self._waiting = False
            self._took(_now())

    def _took(self, now: float) -> None:
        proven = self._proofs.proven
        if proven is None:
            return
        age = min(proven.max_age_s, MAX_SESSION_AGE_S)
        self._taken_until = now + age
        self._renew_at = now + RENEW_FRACTION * age

    def _gave(self, now: float) -> None:
        self._given_until = now + min(self._proofs.given_for_s, MAX_SESSION_AGE_S)

    def _start(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


def _now() -> float:
    return asyncio.get_running_loop().time()
