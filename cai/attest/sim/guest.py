"""The simulated TDX guest: a quote source with dials for every field and failure."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cai.attest.sim import eventlog, intel
from cai.attest.sim.intel import PADDING, QuoteFailure
from cai.attest.statement import REPORT_DATA_SIZE
from cai.attest.tdx.quote import BODY_LAYOUT, TD10, TD15
from cai.attest.tdx.runtime_events import replay
from cai.errors import FormatError, InputError, StorageError

if TYPE_CHECKING:
    from cai.attest.sim.platform import SimulatedPlatform

NORMAL_ATTRIBUTES = 1 << 28
DEBUG_ATTRIBUTE = 1 << 0
XFAM = bytes.fromhex("e702060000000000")


@dataclass(frozen=True, slots=True)
class GuestSettings:
    """What a simulated guest is like.

    Attributes:
        image: mr_td and rtmr0 to rtmr2 are derived from it: another image, other measurements.
        debug: started as a debug guest.
        rtmr3_events: extended into rtmr3 in order, each as its SHA-384.
        quote_seconds: how long a quote takes; quotes of one platform never overlap.
        command_line: of the kernel, measured into rtmr2.
        td15: quotes are version 5 with a TD 1.5 body.
        fields: body fields (by Trustee's name, e.g. ``xfam``) that replace the guest's own before
            the quote is signed.
        log: whether the guest has an event log.
        log_events: events that the log shows in rtmr3 in place of those that happened.
        padding: what follows the signature section of a quote.
        failure: how the quoting hardware is broken.
        unavailable: no quote can be made at all.
    """

    image: str = "demo"
    debug: bool = False
    rtmr3_events: tuple[bytes, ...] = ()
    quote_seconds: float = 0.0
    command_line: str = "ro console=ttyS0 simulated"
    td15: bool = False
    fields: Mapping[str, bytes] = field(default_factory=dict)
    log: bool = True
    log_events: tuple[bytes, ...] | None = None
    padding: bytes = PADDING
    failure: QuoteFailure | None = None
    unavailable: bool = False


class SimulatedGuest:
    """A simulated TDX guest; a ``QuoteSource``.

    Args:
        platform: where it runs.
        settings: the dials.

    Raises:
        InputError: a field to replace is unknown or of another size.
    """

    simulated = True

    def __init__(self, platform: SimulatedPlatform, settings: GuestSettings) -> None:
        self.settings = settings
        self._platform = platform
        self._events: list[bytes] = list(settings.rtmr3_events)
        self._boot = eventlog.boot_events(settings.image, settings.command_line)
        self._layout = BODY_LAYOUT[TD15 if settings.td15 else TD10]
        sizes = dict(self._layout)
        for name, value in settings.fields.items():
            if sizes.get(name) != len(value):
                raise InputError(
                    f"a simulated quote has no field {name!r} of {len(value)} bytes",
                    hint=f"known are: {', '.join(sizes)}",
                )

    def extend_rtmr3(self, event: bytes) -> None:
        """Extend rtmr3 with the SHA-384 of an event, as a running guest does."""
        self._events.append(event)

    @property
    def measurements(self) -> dict[str, str]:
        """mr_td and rtmr0 to rtmr3 in hex, by the names of ``policy.toml``."""
        body = self._fields(bytes(REPORT_DATA_SIZE))
        named = {f"rtmr{number}": body[f"rtmr_{number}"].hex() for number in range(4)}
        return {"mr_td": body["mr_td"].hex(), **named}

    def quote(self, report_data: bytes) -> bytes:
        """A quote over exactly these 64 bytes.

        Raises:
            FormatError: the report data is not 64 bytes.
            StorageError: the guest is dialled to have no quotes.
        """
        if len(report_data) != REPORT_DATA_SIZE:
            raise FormatError(f"report data of {len(report_data)} bytes, expected 64")
        if self.settings.unavailable:
            raise StorageError("the simulated quoting service does not answer")
        fields = self._fields(report_data)
        body = b"".join(fields[name] for name, _size in self._layout)
        with self._platform.quoting:
            if self.settings.quote_seconds > 0:
                time.sleep(self.settings.quote_seconds)
            return intel.make_quote(
                self._platform.processor,
                body=body,
                qe_id=self._platform.qe_id,
                version=5 if self.settings.td15 else 4,
                padding=self.settings.padding,
                failure=self.settings.failure,
            )

    def event_log(self) -> bytes | None:
        """Boot and runtime events, which replay to the registers of the guest's quotes."""
        if not self.settings.log:
            return None
        shown = self.settings.log_events
        return eventlog.event_log(self._boot, self._events if shown is None else shown)

    def _fields(self, report_data: bytes) -> dict[str, bytes]:
        attributes = NORMAL_ATTRIBUTES | (DEBUG_ATTRIBUTE if self.settings.debug else 0)
        registers = eventlog.registers(self._boot)
        return {
            # What is not named here (owner fields, the service TD, seam attributes) is zero.
            **{name: bytes(size) for name, size in self._layout},
            "tcb_svn": intel.TEE_TCB_SVN,
            "mr_seam": intel.MR_SEAM,
            "td_attributes": attributes.to_bytes(8, "little"),
            "xfam": XFAM,
            "mr_td": eventlog.measured_image(self.settings.image),
            **{f"rtmr_{number}": value for number, value in enumerate(registers)},
            "rtmr_3": replay(self._events),
            "report_data": report_data,
            **({"tee_tcb_svn2": intel.TEE_TCB_SVN} if self.settings.td15 else {}),
            **self.settings.fields,
        }
