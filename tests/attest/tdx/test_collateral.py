"""Collateral files and the store."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai.attest.tdx.collateral import (
    MAX_COLLATERAL_FILE,
    Collateral,
    CollateralStore,
    load_collateral,
    parse_collateral,
)
from cai.errors import FormatError, InputError, InputMissing, LimitExceeded

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform

FMSPC = b"SIMUL\x00".hex()
START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def members(platform: SimulatedPlatform) -> dict[str, str]:
    from cai.attest.sim import intel

    return intel.collateral(platform.processor, now=START)


def encoded(members: dict[str, Any], **changes: object) -> bytes:
    return json.dumps({**members, **changes}).encode()


def inner(members: dict[str, str], part: str, **changes: object) -> dict[str, str]:
    value = {**json.loads(members[part]), **changes}
    value = {name: item for name, item in value.items() if item is not None}
    return {**members, part: json.dumps(value)}


def parsed(data: bytes) -> Collateral:
    result = parse_collateral(data, where="file")
    assert result is not None
    return result


def test_index_terms_and_window(members: dict[str, str]) -> None:
    item = parsed(encoded(members))
    assert (item.fmspc, item.ca, item.eval_data_number) == (FMSPC, "platform", 19)
    assert item.issued == START - timedelta(hours=1)
    assert item.expires == START + timedelta(days=30)
    assert item.covers(START)
    assert not item.covers(START - timedelta(hours=1, seconds=1))
    assert not item.covers(START + timedelta(days=30, seconds=1))


def test_sgx_collateral_is_not_ours(members: dict[str, str]) -> None:
    assert parse_collateral(encoded(inner(members, "tcb_info", id="SGX")), where="file") is None


def test_store_gives_the_newest_that_covers(platform: SimulatedPlatform) -> None:
    from cai.attest.sim import intel

    items = [
        parsed(encoded(intel.collateral(platform.processor, now=START + timedelta(days=days))))
        for days in (0, 20, 10)
    ]
    store = CollateralStore(items)
    assert len(store) == 3
    assert store.find(FMSPC.upper(), "platform") is items[1]
    assert store.find(FMSPC, "platform", START + timedelta(days=5)) is items[0]
    assert store.find(FMSPC, "platform", START + timedelta(days=15)) is items[2]
    assert store.find(FMSPC, "platform", START + timedelta(days=500)) is items[1]
    assert store.find(FMSPC, "processor") is None
    assert store.find("00" * 6, "platform") is None
    assert CollateralStore.empty().find(FMSPC, "platform") is None


@pytest.mark.parametrize(
    "change",
    [
        {"pck_certificate_chain": "x"},
        {"unknown": "x"},
        {"tcb_info": 1},
        {"tcb_info": "{"},
        {"tcb_info": "[]"},
        {"tcb_info": "\ud800"},
        {"qe_identity": "{}"},
        {"pck_crl": ""},
        {"pck_crl": "zz"},
        {"pck_crl": "3000"},
        {"root_ca_crl": "00"},
        {"tcb_info_issuer_chain": "x" * 70_000},
    ],
    ids=str,
)
def test_malformed_files_are_refused(members: dict[str, str], change: dict[str, object]) -> None:
    with pytest.raises((FormatError, LimitExceeded)):
        parse_collateral(encoded(members, **change), where="file")


@pytest.mark.parametrize(
    "change",
    [
        {"fmspc": None}, {"fmspc": 5}, {"fmspc": "00"}, {"fmspc": "zz" * 6},
        {"tcbEvaluationDataNumber": None}, {"tcbEvaluationDataNumber": True},
        {"issueDate": None}, {"issueDate": "yesterday"}, {"issueDate": "2026-01-01T00:00:00"},
        {"nextUpdate": 7},
    ],
    ids=str,
)  # fmt: skip
def test_malformed_tcb_info_is_refused(members: dict[str, str], change: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        parse_collateral(encoded(inner(members, "tcb_info", **change)), where="file")


def test_a_missing_member_is_refused(members: dict[str, str]) -> None:
    for name in members:
        rest = {key: value for key, value in members.items() if key != name}
        with pytest.raises(FormatError, match="not collateral"):
            parse_collateral(encoded(rest), where="file")


def test_a_pck_crl_of_somebody_else_is_refused(members: dict[str, str]) -> None:
    with pytest.raises(FormatError, match="neither"):
        parse_collateral(encoded(members, pck_crl=members["root_ca_crl"]), where="file")


def test_directory(tmp_path: Path, members: dict[str, str]) -> None:
    with pytest.raises(InputMissing):
        load_collateral(tmp_path / "absent")
    file = tmp_path / "one.json"
    file.write_bytes(encoded(members))
    (tmp_path / "readme.txt").write_text("not read")
    assert len(load_collateral(tmp_path)) == 1
    with pytest.raises(InputError, match="neither a directory nor a tar"):
        load_collateral(file)
    (tmp_path / "two.json").write_bytes(b" " * (MAX_COLLATERAL_FILE + 1))
    with pytest.raises(LimitExceeded, match=r"two\.json"):
        load_collateral(tmp_path)
    (tmp_path / "two.json").write_text("{}")
    with pytest.raises(FormatError, match=r"two\.json"):
        load_collateral(tmp_path)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_leak_nothing(data: bytes) -> None:
    with pytest.raises((FormatError, LimitExceeded)):
        parse_collateral(data, where="file")


@given(
    part=st.sampled_from(["tcb_info", "qe_identity", "pck_crl", "root_ca_crl"]),
    at=st.integers(0, 4000),
    patch=st.text(alphabet="0123456789abcdef{}[]\",: eE.-", min_size=1, max_size=6),
)
def test_altered_parts_leak_nothing(
    platform: SimulatedPlatform, part: str, at: int, patch: str
) -> None:
    from cai.attest.sim import intel

    members = intel.collateral(platform.processor, now=START)
    text = members[part]
    at %= len(text)
    members[part] = text[:at] + patch + text[at + len(patch) :]
    with contextlib.suppress(FormatError, LimitExceeded):
        parse_collateral(encoded(members), where="file")
