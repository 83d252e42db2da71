"""What docs/tng-ohttp.md says in numbers is what the code does."""

from __future__ import annotations

from pathlib import Path

from tng.ohttp.exchange import MAX_REPLAY
from tng.ohttp.keys import FILE_VALID_S, MAX_OPENED
from tng.ohttp.messages import MAX_METADATA
from tng.ohttp.origin import RENEW

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "tng-ohttp.md").read_text()


def test_numbers() -> None:
    assert f"the last {MAX_OPENED:,}".replace(",", " ") in TEXT
    assert f"at most {MAX_REPLAY // 2**20} MiB" in TEXT
    assert f"metadata over {MAX_METADATA // 2**20} MiB" in TEXT
    assert f"at {RENEW * 100:.0f} % of its time" in TEXT
    assert FILE_VALID_S == 600
    assert "ten minutes" in TEXT
