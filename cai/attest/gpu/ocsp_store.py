"""A set of revocation answers, the directory they are kept in, and the check of a device's chains.

An operator fetches answers without a nonce on a schedule and supplies them; verification never
touches the network. ``load_ocsp`` is the only part that touches a disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType

from cai.attest.certificates import common_name
from cai.attest.gpu.ocsp import (
    MAX_RESPONSE,
    Link,
    OcspAnswer,
    authenticate_answer,
    serial_number,
)
from cai.attest.verdict import Check, check, not_asked
from cai.errors import EvidenceRefused, FormatError, InputMissing, LimitExceeded, from_os_error

MAX_FILES = 65536
"""Most files in a directory of answers; each device has one certificate of its own."""

MAX_TRIED = 16
"""Most answers about one serial number that are looked at."""

SUFFIXES = (".der", ".ocsp")
"""Names of files that are read: DER of OCSP responses."""

Found = tuple[OcspAnswer | None, tuple[str, ...]]
"""The newest authentic answer about a certificate, and why others are none."""


@dataclass(frozen=True, slots=True)
class OcspStore:
    """Answers by the serial number they claim to be about.

    Attributes:
        answers: serial number to answers, DER.
        if_available: a certificate without a current answer is *not asked* instead of refused;
            then facts say so, and a policy decides.
    """

    answers: Mapping[int, tuple[bytes, ...]]
    if_available: bool = False

    @classmethod
    def of(cls, answers: Iterable[bytes], *, if_available: bool = False) -> OcspStore:
        """A store of these answers.

        Raises:
            LimitExceeded, FormatError, EvidenceRefused: one of them is no answer.
        """
        found: dict[int, tuple[bytes, ...]] = {}
        for answer in answers:
            number = serial_number(answer)
            found[number] = (*found.get(number, ()), answer)
        return cls(MappingProxyType(found), if_available)

    def newest(self, link: Link, now: datetime) -> Found:
        """The newest authentic answer about a certificate, and why others are none."""
        certificate, issuer = link
        found: list[OcspAnswer] = []
        bad: list[str] = []
        for data in self.answers.get(certificate.serial_number, ())[:MAX_TRIED]:
            try:
                answer = authenticate_answer(
                    data, certificate=certificate, issuer=issuer, now=now
                )
            except (FormatError, LimitExceeded, EvidenceRefused) as error:
                bad.append(error.message)
            else:
                found.append(answer)
        return max(found, key=lambda item: item.produced, default=None), tuple(bad)


def check_revocation(
    name: str, links: Sequence[Link], *, store: OcspStore, now: datetime,
    known: dict[Link, Found] | None = None,
) -> tuple[Check, datetime | None]:
    """Ask a store about every certificate behind a device (spec-evidence §4.8).

    The newest authentic answer counts, so an older ``good`` never hides a revocation. An answer
    that says anything but good fails even after it has expired.

    Args:
        name: of the check, e.g. ``gpu.0.ocsp``.
        links: certificates with their issuers.
        store: the answers there are.
        now: time of the verification, timezone-aware.
        known: answers found before, for the same store and time; what is found is added.

    Returns:
        The check, and ``thisUpdate`` of the oldest answer if there is a current one for each.
    """
    known = {} if known is None else known
    produced: list[datetime] = []
    missing: list[str] = []
    for link in dict.fromkeys(links):
        title = common_name(link[0]) or "unnamed certificate"
        if link not in known:
            known[link] = store.newest(link, now)
        answer, bad = known[link]
        if answer is not None and not answer.good:
            reason = f"{title} is {answer.status}"
            return check(name, passed=False, observed=answer.status, reason=reason), None
        if answer is None:
            missing.append(f"{title}: {'; '.join(bad) or 'no answer'}")
        elif not answer.current(now):
            missing.append(f"{title}: the answer expired at {answer.expires.isoformat()}")
        else:
            produced.append(answer.produced)
    if missing:
        reason = "; ".join(missing)
        if store.if_available:
            return not_asked(name, f"{len(produced)} of {len(links)}", reason), None
        return check(name, passed=False, observed=f"{len(produced)} answers", reason=reason), None
    oldest = min(produced)
    return check(name, passed=True, observed=f"good, oldest of {oldest.isoformat()}"), oldest


def load_ocsp(path: Path, *, if_available: bool = False) -> OcspStore:
    """Read a directory of OCSP responses (``*.der``, ``*.ocsp``), or one file.

    Nothing is verified here.

    Raises:
        InputMissing, InputError, StorageError: it cannot be read.
        LimitExceeded, FormatError, EvidenceRefused: a file is no answer.
    """
    if not path.exists():
        raise InputMissing(f"OCSP answers: {path} does not exist")
    try:
        names = sorted(path.iterdir()) if path.is_dir() else [path]
        names = [name for name in names if name.suffix in SUFFIXES and name.is_file()]
        if len(names) > MAX_FILES:
            raise LimitExceeded(f"{path}: more than {MAX_FILES} OCSP answers")
        answers = [_read(name) for name in names]
    except OSError as error:
        raise from_os_error(error, f"read OCSP answers {path}") from error
    return OcspStore.of(answers, if_available=if_available)


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(MAX_RESPONSE + 1)
    try:
        serial_number(data)
    except (FormatError, LimitExceeded, EvidenceRefused) as error:
        raise type(error)(f"{path.name}: {error.message}") from error
    return data
