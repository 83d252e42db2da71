"""What one caller may ask for: requests and tokens a minute, requests at once.

Buckets refill steadily. Tokens are known only when the backend has counted them, so a request may
overdraw its caller's bucket; the next ones wait until that is paid back.
"""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from cai.settings import Section
from tng.guard.refusals import GuardRefused

MAX_RATE = 10**9
"""Largest limit that is accepted, per minute."""

MAX_ACCOUNTS = 20_000
"""Most callers that are remembered; idle ones are forgotten first."""

MAX_SHOWN = 100
"""Most accounts that the control interface shows."""

BUSY_RETRY_S = 1.0
"""What a caller with too many requests at once is told to wait, seconds."""

FORGET_S = 120.0
"""How long an idle caller is remembered at least, seconds: longer than a bucket takes to fill."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one caller; 0 is none.

    Attributes:
        requests: a minute.
        tokens: of prompt and answer together, a minute.
        concurrent: requests at once.
    """

    requests: int = 0
    tokens: int = 0
    concurrent: int = 0

    def to_json(self) -> dict[str, int]:
        """The limits as settings."""
        return {
            "requests_per_minute": self.requests,
            "tokens_per_minute": self.tokens,
            "concurrent_requests": self.concurrent,
        }


NO_LIMITS = Limits()
"""Everything is allowed."""


def parse_limits(section: Section | None) -> Limits:
    """Read limits, all of them optional.

    Raises:
        SettingError: one is out of its range.
    """
    if section is None:
        return NO_LIMITS
    limits = Limits(
        section.integer("requests_per_minute", 0, least=0, most=MAX_RATE, unit="requests"),
        section.integer("tokens_per_minute", 0, least=0, most=MAX_RATE, unit="tokens"),
        section.integer("concurrent_requests", 0, least=0, most=MAX_RATE, unit="requests"),
    )
    section.finish()
    return limits


@dataclass(slots=True)
class _Bucket:
    """Fills by ``rate`` a minute, up to ``rate``."""

    rate: int
    level: float
    at: float

    def fill(self, now: float) -> None:
        self.level = min(self.rate, self.level + (now - self.at) * self.rate / 60)
        self.at = now

    def wait(self, need: float) -> float:
        """Seconds until it holds ``need``; 0 when it does."""
        return max(0.0, (need - self.level) * 60 / self.rate)


@dataclass(slots=True)
class Account:
    """What one caller did since the gateway started, and what it still may.

    Attributes:
        requests: let through.
        refused: refused by a limit.
        prompt_tokens: counted by the backend.
        completion_tokens: counted by the backend.
        running: requests at this moment.
    """

    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    running: int = 0
    buckets: dict[str, _Bucket] = field(default_factory=dict)
    used: float = 0.0

    def to_json(self) -> dict[str, int]:
        """What the control interface shows."""
        return {
            "requests": self.requests,
            "refused": self.refused,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "running": self.running,
        }


class Ledger:
    """The accounts of one gateway.

    Args:
        concurrent: most requests at once, of all callers together.
        clock: monotonic, seconds.
    """

    def __init__(self, concurrent: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = concurrent
        self._clock = clock
        self._accounts: OrderedDict[str, Account] = OrderedDict()
        self.running = 0

    def admit(self, caller: str, limits: Limits) -> None:
        """Let one request of a caller begin; ``done`` ends it.

        Raises:
            GuardRefused: 429 when a limit of the caller is reached, 503 when one of the gateway is.
        """
        now = self._clock()
        account = self._account(caller, now)
        try:
            if limits.concurrent and account.running >= limits.concurrent:
                raise _limited("concurrent_requests", "requests at once", BUSY_RETRY_S)
            tokens = _bucket(account, "tokens", limits.tokens, now)
            requests = _bucket(account, "requests", limits.requests, now)
            if tokens is not None and tokens.level < 1:
                raise _limited("tokens_per_minute", "tokens per minute", tokens.wait(1))
            if requests is not None and (wait := requests.wait(1)):
                raise _limited("requests_per_minute", "requests per minute", wait)
            if self.running >= self._most:
                raise GuardRefused(
                    503, "overloaded", "the gateway has too many requests",
                    retry_after_s=BUSY_RETRY_S,
                )  # fmt: skip
        except GuardRefused:
            account.refused += 1
            raise
        if requests is not None:
            requests.level -= 1
        account.requests += 1
        account.running += 1
        self.running += 1

    def done(self, caller: str, limits: Limits, *, prompt: int = 0, completion: int = 0) -> None:
        """End a request that was admitted, and charge what it used.

        Args:
            caller: as admitted.
            limits: as admitted.
            prompt: tokens of the prompt.
            completion: tokens of the answer.
        """
        now = self._clock()
        account = self._account(caller, now)
        account.running = max(0, account.running - 1)
        self.running = max(0, self.running - 1)
        account.prompt_tokens += prompt
        account.completion_tokens += completion
        tokens = _bucket(account, "tokens", limits.tokens, now)
        if tokens is not None:
            tokens.level -= prompt + completion

    def status(self) -> dict[str, dict[str, int]]:
        """The accounts of the callers that came last."""
        last = itertools.islice(reversed(self._accounts.items()), MAX_SHOWN)
        return {caller: account.to_json() for caller, account in last}

    def _account(self, caller: str, now: float) -> Account:
        account = self._accounts.get(caller)
        if account is None:
            account = self._accounts[caller] = Account()
            self._forget(now)
        account.used = now
        self._accounts.move_to_end(caller)
        return account

    def _forget(self, now: float) -> None:
        if len(self._accounts) <= MAX_ACCOUNTS:
            return
        for caller, account in list(self._accounts.items()):
            if account.used + FORGET_S > now or len(self._accounts) <= MAX_ACCOUNTS:
                return
            if not account.running:
                del self._accounts[caller]


def _bucket(account: Account, name: str, rate: int, now: float) -> _Bucket | None:
    if not rate:
        account.buckets.pop(name, None)
        return None
    bucket = account.buckets.get(name)
    if bucket is None:
        bucket = account.buckets[name] = _Bucket(rate, rate, now)
    bucket.rate = rate
    bucket.fill(now)
    return bucket


def _limited(code: str, what: str, wait: float) -> GuardRefused:
    return GuardRefused(
        429, code, f"this caller's limit of {what} is reached", retry_after_s=wait
    )
