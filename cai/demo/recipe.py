"""The files that the demo writes for its parties, as a person would write them by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cai.errors import StorageError, from_os_error

RESOURCE = "default/aliyun/model-decryption-key"
KEY_ID = f"kbs:///{RESOURCE}"
"""Where the release record lives in the key broker."""

SERVICE = "cai-demo"
"""The service's name in ``launch.json``."""

HOST_UP = [
    "cai", "host", "up", "--env", "cai.env", "--model", "sealed", "--launch", "launch.json",
    "--run-dir", "run", "--unsafe-simulated-tee", "sim/platform", "--json",
]
"""The GPU host's one command."""

def write_env(path: Path, *, trustee_url: str, service_port: int, mount_point: Path) -> None:
    """``cai.env``: the settings of the GPU host."""
    write_new(
        path,
        f"TRUSTEE_URL={trustee_url}\n"
        "TRUSTEE_POLICY=default\n"
        f"MODEL_KEY_ID={KEY_ID}\n"
        "MODEL_ENCRYPTION_METHOD=cai\n"
        f"MODEL_SERVICE_PORT={service_port}\n"
        f"MODEL_MOUNT_POINT={mount_point}\n",
    )


def egress(*, port: int, agent: Path, engine: Path) -> dict[str, Any]:
    """The host's gateway: proves each session, then forwards to the engine's Unix socket."""
    return {
        "add_egress": [
            {
                "mapping": {
                    "rules": [
                        {
                            "in": {"host": "127.0.0.1", "port": port},
                            "out": {"unix": str(engine)},
                        }
                    ]
                },
                "attest": {"aa_addr": f"unix://{agent}"},
            }
        ]
    }


def ingress(*, port: int, control: int, verify: Mapping[str, Any]) -> dict[str, Any]:
    """The client's gateway: an HTTP proxy that verifies each guest itself, and can be asked."""
    return {
        "control_interface": {"restful": {"host": "127.0.0.1", "port": control}},
        "add_ingress": [
            {
                "http_proxy": {"proxy_listen": {"host": "127.0.0.1", "port": port}},
                "verify": dict(verify),
            }
        ]
    }


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a settings file in JSON, for people to read."""
    write_new(path, json.dumps(value, indent=2) + "\n")


def write_new(path: Path, text: str) -> None:
    """Write a file that only its owner can read.

    Raises:
        StorageError: it exists already or cannot be written.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise StorageError(f"{path} exists already", hint="choose an empty directory") from error
    except OSError as error:
        raise from_os_error(error, f"write {path}") from error
