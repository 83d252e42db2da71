"""``cai.env``: the host's settings, with exactly the names that operators know (design §5)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from cai.errors import SettingError
from cai.settings import parse_env, read_settings_file

NAMES = (
    "TRUSTEE_URL",
    "TRUSTEE_POLICY",
    "MODEL_KEY_ID",
    "MODEL_ENCRYPTION_METHOD",
    "MODEL_OSS_BUCKET_PATH",
    "MODEL_OSS_ENDPOINT",
    "MODEL_OSS_ACCESS_KEY_ID",
    "MODEL_OSS_SECRET_ACCESS_KEY",
    "MODEL_OSS_SESSION_TOKEN",
    "MODEL_SHARING_PEER",
    "MODEL_SERVICE_PORT",
    "MODEL_MOUNT_POINT",
)
"""Every name of ``cai.env``; any other is an error."""

MEASURED = (
    "TRUSTEE_URL",
    "TRUSTEE_POLICY",
    "MODEL_KEY_ID",
    "MODEL_ENCRYPTION_METHOD",
    "MODEL_SERVICE_PORT",
    "MODEL_MOUNT_POINT",
)
"""Settings that ``launch.json`` repeats and RTMR3 therefore measures (decisions §1.2)."""

_KEY_ID = re.compile(r"kbs:///([\w][\w.\-]*)/([\w][\w.\-]*)/([\w][\w.\-]*)", re.ASCII)


@dataclass(frozen=True, slots=True)
class HostSettings:
    """The settings that this version uses, checked.

    Attributes:
        values: the measured settings by name, for ``launch.json``.
        trustee_url: base to which ``/kbs/v0`` is appended, without a final slash.
        trustee_policy: policy id the host expects to be appraised under.
        key_path: ``repo/type/tag`` of ``MODEL_KEY_ID``.
        service_port: where the gateway answers.
        mount_point: where the plaintext appears.
    """

    values: Mapping[str, str]
    trustee_url: str
    trustee_policy: str
    key_path: str
    service_port: int
    mount_point: Path


def load_host_settings(path: Path) -> HostSettings:
    """Read and check ``cai.env``.

    Raises:
        SettingError: an unknown, missing or unusable setting.
        FormatError, InputMissing, StorageError: the file cannot be read.
    """
    values = parse_env(read_settings_file(path, what="settings"), NAMES, where=path.name)
    values.setdefault("TRUSTEE_POLICY", "default")
    values.setdefault("MODEL_ENCRYPTION_METHOD", "cai")
    values.setdefault("MODEL_SERVICE_PORT", "8080")
    values.setdefault("MODEL_MOUNT_POINT", "/tmp/model")  # noqa: S108 - the guide's own default
    for name in ("TRUSTEE_URL", "MODEL_KEY_ID"):
        if not values.get(name):
            raise SettingError(f"{path.name}: {name} is missing", hint=f"set {name}=…")
    _check_method(values["MODEL_ENCRYPTION_METHOD"], path.name)
    return HostSettings(
        values={name: values[name] for name in MEASURED},
        trustee_url=_url(values["TRUSTEE_URL"], path.name),
        trustee_policy=values["TRUSTEE_POLICY"],
        key_path=key_path(values["MODEL_KEY_ID"]),
        service_port=_port(values["MODEL_SERVICE_PORT"], path.name),
        mount_point=_mount_point(values["MODEL_MOUNT_POINT"], path.name),
    )


def key_path(uri: str) -> str:
    """``repo/type/tag`` of a resource URI.

    Raises:
        SettingError: not of the form ``kbs:///repo/type/tag``.
    """
    match = _KEY_ID.fullmatch(uri)
    if match is None:
        raise SettingError(f"{uri!r} is not a key id", hint="kbs:///<repo>/<type>/<tag>")
    return "/".join(match.groups())


def _check_method(method: str, where: str) -> None:
    if method == "cai":
        return
    if method == "sam":
        raise SettingError(
            f"{where}: MODEL_ENCRYPTION_METHOD=sam is a closed format that only its vendor opens",
            hint="seal the model with `cai encrypt` and set MODEL_ENCRYPTION_METHOD=cai",
        )
    raise SettingError(
        f"{where}: MODEL_ENCRYPTION_METHOD={method} is not supported by this version",
        hint="use MODEL_ENCRYPTION_METHOD=cai",
    )


def _url(text: str, where: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise SettingError(f"{where}: TRUSTEE_URL is not an http or https address")
    return text.rstrip("/")


def _port(text: str, where: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 65535:
        raise SettingError(f"{where}: MODEL_SERVICE_PORT must be 1 to 65535")
    return int(text)


def _mount_point(text: str, where: str) -> Path:
    path = Path(text)
    if not path.is_absolute() or ".." in path.parts:
        raise SettingError(f"{where}: MODEL_MOUNT_POINT must be an absolute path")
    return path
