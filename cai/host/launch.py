"""``launch.json``: what a guest was launched to do, and the digest that measures it.

The exact bytes of this file are extended into RTMR3 before anything is served (decisions §1.2), so
a policy that names the digest names the settings, the owner and the service along with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha384

from cai import jcs
from cai.errors import SettingError
from cai.host.settings import MEASURED, HostSettings
from cai.settings import Section, refuse_unknown

MAX_LAUNCH = 256 * 1024
"""Largest ``launch.json``, bytes."""

DIALECTS = ("cai/1", "rats-tls")
"""What a gateway may speak: our dialect, and stock TNG's with evidence that binds only its key."""

KBS_FORMS = ("cai", "trustee")
"""Release forms: to a CAI key broker, or to a stock one (decisions §2.3)."""

LAUNCH_VERSION = 1
"""Value of the member ``cai-launch``."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A parsed ``launch.json``.

    Attributes:
        encoded: the exact bytes that were measured.
        settings: the measured settings of ``cai.env``.
        owner_key: the owner's Ed25519 public key, 64 hex digits; the release record must be
            signed by it.
        service_id: the service as its owner names it.
        kbs: which release form is spoken, ``cai`` or ``trustee`` (decisions §2.3).
        kbs_key: the key broker's ticket key, 64 hex digits; empty does not pin one.
        dialects: ALPN names the gateway may speak.
        images: image digests by service name; empty when nothing runs in containers.
        compose_sha256: SHA-256 of the compose file's exact bytes, or empty.
    """

    encoded: bytes
    settings: Mapping[str, str]
    owner_key: str
    service_id: str
    kbs: str = "cai"
    dialects: tuple[str, ...] = ("cai/1",)
    images: Mapping[str, str] = field(default_factory=dict)
    compose_sha256: str = ""
    kbs_key: str = ""

    @property
    def digest(self) -> str:
        """SHA-384 of the exact bytes, hex."""
        return sha384(self.encoded).hexdigest()

    def require_settings(self, settings: HostSettings) -> None:
        """Demand that the running settings are the measured ones.

        Raises:
            SettingError: naming the first that differs.
        """
        for name in MEASURED:
            if settings.values[name] != self.settings.get(name):
                raise SettingError(
                    f"{name} differs from the one that launch.json measures",
                    hint="write launch.json anew with `cai measure` and start the guest again",
                )


def write_launch(
    settings: HostSettings,
    *,
    owner_key: str,
    service_id: str,
    kbs: str = "cai",
    kbs_key: str = "",
    dialects: tuple[str, ...] = ("cai/1",),
) -> bytes:
    """The bytes of a ``launch.json`` for these settings.

    Raises:
        SettingError: a value has another form.
    """
    encoded = jcs.canonical(
        {
            "cai-launch": LAUNCH_VERSION,
            "compose_sha256": "",
            "dialects": list(dialects),
            "images": {},
            "kbs": kbs,
            "kbs_key": kbs_key,
            "owner_key": owner_key,
            "service_id": service_id,
            "settings": dict(settings.values),
        }
    )
    return parse_launch(encoded).encoded


def parse_launch(data: bytes) -> Launch:
    """Parse ``launch.json`` strictly.

    Raises:
        FormatError, LimitExceeded, SettingError: a member is missing, unknown or malformed.
    """
    section = Section(jcs.parse(data, what="launch.json", limit=MAX_LAUNCH), where="launch.json")
    section.integer("cai-launch", least=LAUNCH_VERSION, most=LAUNCH_VERSION, unit="(version)")
    settings = section.raw("settings")
    images = section.raw("images")
    for name, value in (("settings", settings), ("images", images)):
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise SettingError(f"launch.json: {name} must map names to strings")
    refuse_unknown(settings, MEASURED, where="launch.json.settings")
    kbs = section.text("kbs")
    if kbs not in KBS_FORMS:
        raise SettingError(
            f"launch.json: kbs is {kbs[:32]!r}", hint=f"known are: {', '.join(KBS_FORMS)}"
        )
    kbs_key = section.text("kbs_key", "")
    dialects = tuple(section.texts("dialects"))
    if not dialects or not set(dialects) <= set(DIALECTS):
        raise SettingError(
            "launch.json: dialects names one that is unknown, or none",
            hint=f"known are: {', '.join(DIALECTS)}",
        )
    launch = Launch(
        encoded=data,
        settings=settings,
        owner_key=_key(section.text("owner_key"), "owner_key"),
        service_id=section.text("service_id"),
        kbs=kbs,
        dialects=dialects,
        images=images,
        compose_sha256=section.text("compose_sha256"),
        kbs_key=_key(kbs_key, "kbs_key") if kbs_key else "",
    )
    section.finish()
    return launch


def _key(text: str, name: str) -> str:
    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
        raise SettingError(f"launch.json: {name} must be 64 lower-case hex digits")
    return text
