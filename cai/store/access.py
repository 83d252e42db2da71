"""Endpoints and credentials of object stores: from the environment or a file, never from argv.

Order: with a named profile, that profile of the configuration file alone; else the environment;
else the profile ``default``. What an SDK of the store would find by itself (an AWS profile, a role
of the machine) comes last, and only for S3. docs/stores.md lists every name.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cai.errors import FormatError, InputMissing, SettingError, from_os_error
from cai.secret import Secret
from cai.settings import Section, read_settings_file, suggestion

CONFIG_VARIABLE = "CAI_STORES"
"""Environment variable that names the configuration file."""

SIGNATURES = ("auto", "v1", "v4")
"""How requests to OSS are signed; ``auto`` is V4 where a region is known."""

Names = Mapping[str, tuple[str, ...]]

_OSS_GROUPS: tuple[tuple[str, str, str], ...] = (
    ("MODEL_OSS_ACCESS_KEY_ID", "MODEL_OSS_SECRET_ACCESS_KEY", "MODEL_OSS_SESSION_TOKEN"),
    ("OSS_ACCESS_KEY_ID", "OSS_ACCESS_KEY_SECRET", "OSS_SESSION_TOKEN"),
    (
        "ALIBABA_CLOUD_ACCESS_KEY_ID", "ALIBABA_CLOUD_ACCESS_KEY_SECRET",
        "ALIBABA_CLOUD_SECURITY_TOKEN",
    ),
)
_S3_GROUPS = (("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),)
_COS_GROUPS = (
    ("COS_SECRET_ID", "COS_SECRET_KEY", "COS_SESSION_TOKEN"),
    ("TENCENTCLOUD_SECRET_ID", "TENCENTCLOUD_SECRET_KEY", "TENCENTCLOUD_SESSION_TOKEN"),
)
_GROUPS = {"oss": _OSS_GROUPS, "s3": _S3_GROUPS, "cos": _COS_GROUPS}
_ENDPOINTS = {
    "oss": ("MODEL_OSS_ENDPOINT", "OSS_ENDPOINT"),
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "cos": ("COS_ENDPOINT",),
}
_REGIONS = {
    "oss": ("OSS_REGION",),
    "s3": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    "cos": ("COS_REGION",),
}


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """How to reach a store; nothing secret is given here.

    Attributes:
        endpoint: address of the object store; wins over environment and file.
        region: its region; empty to take it from the endpoint.
        profile: the profile of the configuration file; empty for environment, then ``default``.
        config: the configuration file; ``None`` for ``$CAI_STORES`` or its usual place.
        environment: in place of the process's own, e.g. a parsed ``cai.env``.
        attempts: tries of each request.
    """

    endpoint: str = ""
    region: str = ""
    profile: str = ""
    config: Path | None = None
    environment: Mapping[str, str] | None = field(default=None, repr=False)
    attempts: int = 7


@dataclass(frozen=True, slots=True)
class Access:
    """What was found for one scheme.

    Attributes:
        endpoint: as written; empty when none was named.
        region: empty when none was named.
        key_id: empty for anonymous access.
        key_secret: with ``key_id``.
        token: of a temporary (STS) credential, if it is one.
        path_style: put the bucket into the path instead of the host name.
        signature: one of ``SIGNATURES``.
        aws_profile: profile of the AWS configuration to use.
    """

    endpoint: str = ""
    region: str = ""
    key_id: str = ""
    key_secret: Secret = field(default_factory=lambda: Secret(b""))
    token: Secret = field(default_factory=lambda: Secret(b""))
    path_style: bool = False
    signature: str = "auto"
    aws_profile: str = ""


def find_access(scheme: str, options: StoreOptions) -> Access:
    """Find endpoint and credentials for ``oss``, ``s3`` or ``cos``.

    Raises:
        SettingError: an unknown profile or setting, half a credential, or a file with secrets that
            others can read.
        FormatError, InputMissing, StorageError: the configuration file cannot be read.
    """
    environment = os.environ if options.environment is None else options.environment
    filed = _from_file(scheme, options, environment)
    known = Access() if options.profile else _from_environment(scheme, environment)
    return Access(
        endpoint=options.endpoint or known.endpoint or filed.endpoint,
        region=options.region or known.region or filed.region,
        key_id=known.key_id or filed.key_id,
        key_secret=known.key_secret if known.key_id else filed.key_secret,
        token=known.token if known.key_id else filed.token,
        path_style=filed.path_style,
        signature=filed.signature,
        aws_profile=filed.aws_profile,
    )


def _from_environment(scheme: str, environment: Mapping[str, str]) -> Access:
    endpoint = _first(_ENDPOINTS[scheme], environment)
    region = _first(_REGIONS[scheme], environment)
    for key_id, secret, token in _GROUPS[scheme]:
        found, hidden = environment.get(key_id, ""), environment.get(secret, "")
        if bool(found) != bool(hidden):
            missing = secret if found else key_id
            raise SettingError(
                f"{missing} is missing beside {key_id if found else secret}",
                hint="set both, or neither",
            )
        if found:
            return Access(
                endpoint, region, found, Secret(hidden.encode()),
                Secret(environment.get(token, "").encode()),
            )
    return Access(endpoint, region)


def _first(names: tuple[str, ...], environment: Mapping[str, str]) -> str:
    return next((environment[name] for name in names if environment.get(name)), "")


def _from_file(scheme: str, options: StoreOptions, environment: Mapping[str, str]) -> Access:
    named = options.config or (
        Path(environment[CONFIG_VARIABLE]) if environment.get(CONFIG_VARIABLE) else None
    )
    home = environment.get("XDG_CONFIG_HOME") or str(
        Path(environment.get("HOME") or "/nonexistent") / ".config"
    )
    path = named or Path(home) / "cai" / "stores.toml"
    profile = options.profile or "default"
    try:
        data = read_settings_file(path, what="store configuration")
    except InputMissing:
        if named or options.profile:
            raise
        return Access()
    try:
        document = tomllib.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise FormatError(f"{path}: not TOML: {error}") from error
    if profile not in document:
        if not options.profile:
            return Access()
        raise SettingError(
            f"{path}: no profile {profile!r}",
            hint=suggestion(profile, document) or f"profiles are: {', '.join(sorted(document))}",
        )
    whole = Section(document[profile], where=f"{path} [{profile}]")
    sections = {name: whole.section(name) for name in ("oss", "s3", "cos")}
    whole.finish()
    section = sections[scheme]
    return _parse(section, scheme, path) if section else Access()


def _parse(section: Section, scheme: str, path: Path) -> Access:
    access = Access(
        endpoint=section.text("endpoint", ""),
        region=section.text("region", ""),
        key_id=section.text("access_key_id", ""),
        key_secret=Secret(section.text("access_key_secret", "").encode()),
        token=Secret(section.text("session_token", "").encode()),
        path_style=section.flag("path_style", default=False),
        signature=section.text("signature", "auto") if scheme == "oss" else "auto",
        aws_profile=section.text("aws_profile", "") if scheme == "s3" else "",
    )
    section.finish()
    if access.signature not in SIGNATURES:
        raise SettingError(f"{section.where}: signature must be one of {', '.join(SIGNATURES)}")
    if bool(access.key_id) != bool(access.key_secret):
        raise SettingError(f"{section.where}: access_key_id and access_key_secret go together")
    if access.key_secret:
        _refuse_readable(path)
    return access


def _refuse_readable(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise from_os_error(error, f"look at {path}") from error
    if mode & 0o077:
        raise SettingError(
            f"{path} holds a secret and others can read it", hint=f"chmod 600 {path}"
        )
