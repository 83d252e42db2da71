"""Events as Trustee's claim ``uefi_event_logs`` shows them to policies (spec-evidence §3.4).

Only digests are authentic. ``details`` are read from event data for people and for policies that
pick an event by its name; ``digest_matches_event`` says where the digest covers those data.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

from cai import jcs
from cai.attest.tdx.eventlog import EV_EVENT_TAG, SHA384, Event, EventLog, tagged_text
from cai.errors import CaiError

MAX_CLAIMS = 112 * 1024
"""Longest JSON of all event claims, bytes; a longer list is left out whole, never cut.

Logs of real boots stay below half of it, and a token that carries it below 256 KiB.
"""

MAX_CONTENT_BRACKETS = 32
"""Most opening brackets of JSON in a runtime event; more stays text, so that nesting is bounded."""

MAX_PATH_NODES = 32
"""Most nodes of one device path that are spelled out."""

TYPE_NAMES = {
    0x00: "EV_PREBOOT_CERT", 0x01: "EV_POST_CODE", 0x02: "EV_UNUSED", 0x03: "EV_NO_ACTION",
    0x04: "EV_SEPARATOR", 0x05: "EV_ACTION", EV_EVENT_TAG: "EV_EVENT_TAG",
    0x07: "EV_S_CRTM_CONTENTS", 0x08: "EV_S_CRTM_VERSION", 0x09: "EV_CPU_MICROCODE",
    0x0A: "EV_PLATFORM_CONFIG_FLAGS", 0x0B: "EV_TABLE_OF_DEVICES", 0x0C: "EV_COMPACT_HASH",
    0x0D: "EV_IPL", 0x0E: "EV_IPL_PARTITION_DATA", 0x0F: "EV_NONHOST_CODE",
    0x10: "EV_NONHOST_CONFIG", 0x11: "EV_NONHOST_INFO", 0x12: "EV_OMIT_BOOT_DEVICE_EVENTS",
    0x80000000: "EV_EFI_EVENT_BASE", 0x80000001: "EV_EFI_VARIABLE_DRIVER_CONFIG",
    0x80000002: "EV_EFI_VARIABLE_BOOT", 0x80000003: "EV_EFI_BOOT_SERVICES_APPLICATION",
    0x80000004: "EV_EFI_BOOT_SERVICES_DRIVER", 0x80000005: "EV_EFI_RUNTIME_SERVICES_DRIVER",
    0x80000006: "EV_EFI_GPT_EVENT", 0x80000007: "EV_EFI_ACTION",
    0x80000008: "EV_EFI_PLATFORM_FIRMWARE_BLOB", 0x80000009: "EV_EFI_HANDOFF_TABLES",
    0x8000000A: "EV_EFI_PLATFORM_FIRMWARE_BLOB2", 0x8000000B: "EV_EFI_HANDOFF_TABLES2",
    0x8000000C: "EV_EFI_VARIABLE_BOOT2", 0x80000010: "EV_EFI_HCRTM_EVENT",
    0x800000E0: "EV_EFI_VARIABLE_AUTHORITY", 0x800000E1: "EV_EFI_SPDM_FIRMWARE_BLOB",
    0x800000E2: "EV_EFI_SPDM_FIRMWARE_CONFIG",
}  # fmt: skip
"""Event types by TCG number."""

_VARIABLES = (0x80000001, 0x80000002, 0x8000000C, 0x800000E0)
_APPLICATIONS = (0x80000003, 0x80000004, 0x80000005)
_COUNTED = (0x8000000A, 0x8000000B)
_TEXTS = (0x01, 0x05, 0x0A, 0x0D, 0x80000007)

_PAYLOAD_INFO = b"td_payload_info\0"
"""Name, padded to 16 bytes, in front of a u32 size and the command line (td-shim)."""


def event_claims(log: EventLog) -> list[dict[str, object]] | None:
    """Each event as a claim, in order.

    Returns:
        The claims, or ``None`` when they are longer than ``MAX_CLAIMS``: a rule that looks for an
        event then finds none.
    """
    claims = [_claim(event) for event in log.events]
    return claims if len(json.dumps(claims)) <= MAX_CLAIMS else None


def _claim(event: Event) -> dict[str, object]:
    return {
        "index": event.register,
        "type_name": TYPE_NAMES.get(event.kind, f"UNKNOWN_{event.kind:#010x}"),
        "event": _b64(event.data),
        "digests": [{"alg": "SHA-384", "digest": event.digests[SHA384].hex()}],
        "digest_matches_event": event.covered,
        "details": _details(event),
    }


def _details(event: Event) -> dict[str, object]:
    data = event.data
    if event.name:
        return {"string": event.name}
    if event.kind == 0x0A and data.startswith(_PAYLOAD_INFO):
        return {"string": f"td_payload_info {_text(data[20:])}"}
    if event.kind in _TEXTS:
        return {"string": _text(data)}
    if event.kind in _COUNTED and data:
        return {"string": _text(data[1 : 1 + data[0]])}
    if event.kind in _VARIABLES:
        return _variable(data)
    if event.kind == EV_EVENT_TAG:
        return _tag(event)
    if event.kind in _APPLICATIONS:
        paths = list(_device_path(data[32:]))
        return {"device_paths": paths} if paths else {}
    return {}


def _text(data: bytes) -> str:
    """The text up to its first NUL; UTF-16 is told by its zero bytes."""
    if len(data) >= 4 and len(data) % 2 == 0 and not any(data[1::2]):
        # The systemd stub names its PE sections so: ``.cmdline``.
        return data.decode("utf-16-le", errors="replace").split("\0")[0].removeprefix(".")
    return data.split(b"\0")[0].decode("utf-8", errors="replace")


def _variable(data: bytes) -> dict[str, object]:
    """UEFI_VARIABLE_DATA: GUID, name length in characters, data length, name, data."""
    if len(data) < 32:
        return {}
    characters = int.from_bytes(data[16:24], "little")
    size = int.from_bytes(data[24:32], "little")
    name_end = 32 + 2 * characters
    if name_end + size != len(data):
        return {}
    guid = data[:16].hex()
    return {
        "variable_name": "-".join((guid[:8], guid[8:12], guid[12:16], guid[16:20], guid[20:])),
        "unicode_name": data[32:name_end].decode("utf-16-le", errors="replace"),
        "unicode_name_length": characters,
        "variable_data": _b64(data[name_end:]),
        "variable_data_length": size,
    }


def _tag(event: Event) -> dict[str, object]:
    text = tagged_text(event)
    if text is None:
        return {"string": _text(event.data[8:])}
    domain, _, rest = text.partition(" ")
    operation, _, content = rest.partition(" ")
    return {
        "unicode_name": "AAEL",
        "string": text,
        "data": {"domain": domain, "operation": operation, "content": _content(content)},
    }


def _content(text: str) -> object:
    """An AAEL event's content: JSON where it is an object or a list, else the text."""
    # Facts and tokens carry it in canonical JSON, several levels down.
    if text[:1] in ("{", "[") and text.count("{") + text.count("[") <= MAX_CONTENT_BRACKETS:
        try:
            value = jcs.parse(text.encode("utf-8"), what="event", limit=len(text) * 4)
            jcs.canonical(value)
        except CaiError:
            return text
        return value
    return text


def _device_path(data: bytes) -> Iterator[str]:
    """UEFI device path nodes: type, subtype, length u16, value; ends with type 0x7F."""
    position = 0
    for _ in range(MAX_PATH_NODES):
        head = data[position : position + 4]
        if len(head) < 4 or head[0] == 0x7F:
            return
        size = int.from_bytes(head[2:], "little")
        value = data[position + 4 : position + size]
        if size < 4 or len(value) != size - 4:
            return
        yield _path_node(head[0], head[1], value)
        position += size


def _path_node(kind: int, subkind: int, value: bytes) -> str:
    if (kind, subkind) == (1, 1) and len(value) == 2:
        return f"Pci({value[0]},{value[1]})"  # function first, as Trustee spells it
    if (kind, subkind) == (2, 1) and len(value) == 8:
        return _acpi(*(int.from_bytes(value[at : at + 4], "little") for at in (0, 4)))
    if (kind, subkind) == (4, 1) and len(value) == 38:
        return _hard_drive(value)
    if (kind, subkind) == (4, 3) and len(value) == 16:
        return f"VenMedia({_guid(value)},)"
    if (kind, subkind) == (4, 4):
        return f"File({value.decode('utf-16-le', errors='replace').rstrip(chr(0))})"
    return f"Path({kind},{subkind},{value.hex()})"


def _acpi(hid: int, uid: int) -> str:
    # A compressed EISA identifier: three letters of five bits, then the product number.
    letters = "".join(chr(64 + (hid >> shift & 0x1F)) for shift in (10, 5, 0))
    return f"ACPI({letters}{hid >> 16:04X},{uid})"


def _hard_drive(value: bytes) -> str:
    number = int.from_bytes(value[:4], "little")
    start, size = (int.from_bytes(value[at : at + 8], "little") for at in (4, 12))
    return f"HD({number},GPT,{_guid(value[20:36])},{start:#x},{size:#x})"


def _guid(guid: bytes) -> str:
    parts = (guid[3::-1], guid[5:3:-1], guid[7:5:-1], guid[8:10], guid[10:])
    return "-".join(part.hex().upper() for part in parts)


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
