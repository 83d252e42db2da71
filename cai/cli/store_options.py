"""Options that ``push``, ``pull`` and ``ls`` share; none of them takes a secret."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cai.errors import UsageError

if TYPE_CHECKING:
    from cai.store import StoreOptions

_DIGEST = re.compile(r"[0-9a-f]{64}")

Uri = Annotated[
    str,
    typer.Argument(
        metavar="URI",
        help="file:PATH, oss://BUCKET/PATH, s3://BUCKET/PATH, cos://BUCKET/PATH, https://HOST/PATH "
        "or BUCKET:/PATH.",
    ),
]
Endpoint = Annotated[
    str, typer.Option("--endpoint", metavar="URL", help="Address of the object store.")
]
Region = Annotated[
    str, typer.Option("--region", help="Its region (default: from the endpoint's name).")
]
Profile = Annotated[
    str, typer.Option("--profile", help="Profile of the store configuration to use.")
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", help="Store configuration (default: $CAI_STORES, ~/.config/cai/stores.toml)."
    ),
]
EnvFile = Annotated[
    Path | None, typer.Option("--env", help="Take MODEL_OSS_* from this cai.env.")
]
Limit = Annotated[
    str, typer.Option("--limit", metavar="RATE", help="Most bytes a second, such as 20M or 512Ki.")
]
Jobs = Annotated[
    int, typer.Option("--jobs", "-j", min=1, max=64, help="Transfers under way at once.")
]
IndexDigest = Annotated[
    str | None,
    typer.Option(
        "--index-sha256", metavar="HEX", help="Insist on the index that the record names."
    ),
]

NAMES = (
    "MODEL_OSS_ENDPOINT",
    "MODEL_OSS_ACCESS_KEY_ID",
    "MODEL_OSS_SECRET_ACCESS_KEY",
    "MODEL_OSS_SESSION_TOKEN",
)
"""What ``--env`` takes out of a ``cai.env``; the rest of that file is not ours."""


def store_options(
    endpoint: str, region: str, profile: str, config: Path | None, env: Path | None
) -> StoreOptions:
    """What the options mean.

    Raises:
        UsageError: two of them contradict each other.
        SettingError, FormatError, InputMissing: ``--env`` cannot be used.
    """
    import os

    from cai.host.settings import NAMES as HOST_NAMES
    from cai.settings import parse_env, read_settings_file
    from cai.store import StoreOptions

    environment = None
    if env is not None:
        if profile:
            raise UsageError("--env and --profile name different credentials", hint="give one")
        values = parse_env(read_settings_file(env, what="settings"), HOST_NAMES, where=env.name)
        # All four come from the file: half of a credential from each place would be a third one.
        rest = {name: value for name, value in os.environ.items() if name not in NAMES}
        environment = rest | {name: values[name] for name in NAMES if values.get(name)}
    return StoreOptions(
        endpoint=endpoint, region=region, profile=profile, config=config, environment=environment
    )


def wanted_digest(text: str | None) -> str | None:
    """The value of ``--index-sha256``.

    Raises:
        UsageError: it is not 64 lower-case hex digits.
    """
    if text is not None and not _DIGEST.fullmatch(text):
        raise UsageError("--index-sha256 must be 64 lower-case hex digits")
    return text
