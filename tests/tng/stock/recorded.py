"""Recordings of TNG 2.12.0."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

VECTORS = Path(os.environ.get("CAI_VECTORS", "../shared/vectors")) / "tng" / "recorded"

NAMES = ("rats_tls_background_check", "rats_tls_passport", "rats_tls_additional_evidence")


def recording(name: str) -> dict[str, Any]:
    path = VECTORS / f"{name}.json"
    if not path.is_file():
        pytest.skip("no recorded vectors (set CAI_VECTORS)")
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def certificate(name: str) -> bytes:
    return base64.b64decode(recording(name)["cert_der_b64"])
