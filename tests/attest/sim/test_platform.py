"""The simulator: what it makes is byte-real, marked, private where it must be, and repeatable."""

from __future__ import annotations

import stat
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from hashlib import sha384
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509

from cai.attest.certificates import load_chain, organisations
from cai.attest.tdx.collateral import load_collateral
from cai.attest.tdx.quote import TD10, parse_quote
from cai.errors import FormatError, InputError, InputMissing, StorageError

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform

NOW = datetime.now(UTC)
BINDING = bytes(range(64))


def test_quote_layout(platform: SimulatedPlatform) -> None:
    from cai.attest.sim import GuestSettings

    guest = platform.guest(GuestSettings())
    quote = parse_quote(guest.quote(BINDING))
    assert (quote.header.version, quote.body_type) == (4, TD10)
    assert quote.body["report_data"] == BINDING
    assert quote.body["td_attributes"].hex() == "0000001000000000"
    assert quote.body["mr_config_id"] == bytes(48)
    measured = {
        "mr_td": quote.body["mr_td"].hex(),
        **{f"rtmr{n}": quote.body[f"rtmr_{n}"].hex() for n in range(4)},
    }
    assert measured == guest.measurements
    assert guest.simulated


def test_image_decides_the_measurements(platform: SimulatedPlatform) -> None:
    from cai.attest.sim import GuestSettings

    one, same, other = (
        platform.guest(GuestSettings(image=image)).measurements for image in ("a", "a", "b")
    )
    assert one == same
    assert all(one[name] != other[name] for name in ("mr_td", "rtmr0", "rtmr1", "rtmr2"))
    assert one["rtmr3"] == "00" * 48


def test_rtmr3_is_extended_by_events_in_order(platform: SimulatedPlatform) -> None:
    from cai.attest.sim import GuestSettings

    events = (b"cai launch", b"cai ready")
    expected = bytes(48)
    for event in events:
        expected = sha384(expected + sha384(event).digest()).digest()
    given = platform.guest(GuestSettings(rtmr3_events=events))
    later = platform.guest(GuestSettings())
    for event in events:
        later.extend_rtmr3(event)
    swapped = platform.guest(GuestSettings(rtmr3_events=events[::-1]))
    assert given.measurements["rtmr3"] == later.measurements["rtmr3"] == expected.hex()
    assert swapped.measurements["rtmr3"] != expected.hex()
    assert parse_quote(later.quote(BINDING)).body["rtmr_3"] == expected


def test_debug_guest_shows_its_bit(platform: SimulatedPlatform) -> None:
    from cai.attest.sim import GuestSettings

    quote = platform.guest(GuestSettings(debug=True)).quote(BINDING)
    assert parse_quote(quote).body["td_attributes"].hex() == "0100001000000000"


@pytest.mark.parametrize("size", [0, 48, 63, 65])
def test_report_data_is_64_bytes(platform: SimulatedPlatform, size: int) -> None:
    from cai.attest.sim import GuestSettings

    with pytest.raises(FormatError):
        platform.guest(GuestSettings()).quote(bytes(size))


def test_gpu_nonce_is_32_bytes(platform: SimulatedPlatform) -> None:
    for size in (0, 31, 48):
        with pytest.raises(FormatError):
            platform.devices(1).collect(bytes(size))


def test_quotes_take_their_time(platform: SimulatedPlatform) -> None:
    from cai.attest.sim import GuestSettings

    guest = platform.guest(GuestSettings(quote_seconds=0.05))
    start = time.monotonic()
    guest.quote(BINDING)
    assert time.monotonic() - start >= 0.05


def test_devices(platform: SimulatedPlatform) -> None:
    assert platform.devices(0).collect(bytes(32)) == ()
    source = platform.devices(8)
    assert len({device.chain for device in source.collect(bytes(32))}) == 8
    assert source.facts() == {
        "cc_feature": "on", "devtools": "off", "multi_gpu_mode": "none", "count": "8",
        "driver": "580.95.05",
    }
    assert source.simulated
    for count in (-1, 9):
        with pytest.raises(InputError):
            platform.devices(count)


def test_every_certificate_says_simulated(platform: SimulatedPlatform, platform_dir: Path) -> None:
    from cai.attest.sim import GuestSettings

    quote = parse_quote(platform.guest(GuestSettings()).quote(BINDING))
    certificates = list(load_chain(quote.pck_chain, what="chain"))
    for device in platform.devices(8).collect(bytes(32)):
        certificates += load_chain(device.chain, what="chain")
    for path in sorted(platform_dir.rglob("*.pem")):
        certificates += x509.load_pem_x509_certificates(path.read_bytes())
    assert len(certificates) > 40
    assert all(organisations(item) == ("SIMULATED",) for item in certificates)


def test_private_files_are_private(platform_dir: Path) -> None:
    private = platform_dir / "platform"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert {path.name for path in private.iterdir()} == {"seed.key", "platform.json"}
    assert stat.S_IMODE((private / "seed.key").stat().st_mode) == 0o600
    seed = (private / "seed.key").read_bytes()
    assert len(seed) == 64
    public = b"".join(path.read_bytes() for path in (platform_dir / "anchors").rglob("*.*"))
    assert b"PRIVATE KEY" not in public
    assert seed not in public


def test_a_loaded_platform_is_the_same_hardware(
    platform: SimulatedPlatform, platform_dir: Path
) -> None:
    from cai.attest.sim import GuestSettings, SimulatedPlatform

    again = SimulatedPlatform.load(platform_dir)
    assert again.directory == platform.directory
    assert again.anchors == platform_dir / "anchors"
    chains = [
        parse_quote(one.guest(GuestSettings()).quote(BINDING)).pck_chain
        for one in (platform, again)
    ]
    assert chains[0] == chains[1]


def test_two_platforms_share_nothing(tmp_path: Path, platform_dir: Path) -> None:
    from cai.attest.sim import SimulatedPlatform

    SimulatedPlatform.create(tmp_path / "other", now=NOW)
    for name in ("tdx-root.pem", "gpu-root.pem"):
        ours = (platform_dir / "anchors" / name).read_bytes()
        assert (tmp_path / "other" / "anchors" / name).read_bytes() != ours


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    from cai.attest.sim import SimulatedPlatform

    SimulatedPlatform.create(tmp_path / "one", now=NOW)
    before = (tmp_path / "one" / "anchors" / "tdx-root.pem").read_bytes()
    with pytest.raises(StorageError, match="exists already"):
        SimulatedPlatform.create(tmp_path / "one", now=NOW)
    assert (tmp_path / "one" / "anchors" / "tdx-root.pem").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises((StorageError, InputError)):
        SimulatedPlatform.create(tmp_path / "file", now=NOW)


def test_load_refuses_what_is_no_platform(tmp_path: Path) -> None:
    from cai.attest.sim import SimulatedPlatform

    with pytest.raises(InputMissing, match="does not exist"):
        SimulatedPlatform.load(tmp_path / "absent")
    with pytest.raises(InputError, match="not a simulated platform"):
        SimulatedPlatform.load(tmp_path)
    SimulatedPlatform.create(tmp_path / "one", now=NOW)
    private = tmp_path / "one" / "platform"
    (private / "seed.key").write_text("garbage")
    with pytest.raises(FormatError, match="not hex"):
        SimulatedPlatform.load(tmp_path / "one")
    (private / "seed.key").unlink()
    with pytest.raises(InputMissing):
        SimulatedPlatform.load(tmp_path / "one")
    for text in ("garbage", '{"format":1}', '{"format":2}',
                 '{"format":2,"made":"yesterday","pck_flags":[]}',
                 '{"format":2,"made":"2026-01-01T00:00:00","pck_flags":[]}'):  # fmt: skip
        (private / "seed.key").write_text("00")
        (private / "platform.json").write_text(text)
        with pytest.raises(FormatError):
            SimulatedPlatform.load(tmp_path / "one")


def test_collateral_lasts_thirty_days_and_can_be_renewed(tmp_path: Path) -> None:
    from cai.attest.sim import SimulatedPlatform, intel

    old = datetime(2026, 1, 1, tzinfo=UTC)
    platform = SimulatedPlatform.create(tmp_path / "one", now=old)
    directory = platform.anchors / "collateral"
    first = load_collateral(directory).find(intel.FMSPC.hex(), "platform")
    assert first is not None
    assert first.expires == old + timedelta(days=30)
    assert first.issued == old - timedelta(hours=1)
    platform.renew_collateral(now=NOW)
    store = load_collateral(directory)
    assert len(store) == 1
    second = store.find(intel.FMSPC.hex(), "platform")
    assert second is not None
    assert second.covers(datetime.now(UTC))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cai.attest.sim", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_command_line(tmp_path: Path) -> None:
    made = run("create", str(tmp_path / "one"))
    assert made.returncode == 0
    assert "SIMULATED" in made.stdout
    again = run("create", str(tmp_path / "one"))
    assert (again.returncode, again.stdout) == (4, "")
    assert "exists already" in again.stderr
    assert run("renew", str(tmp_path / "one")).returncode == 0
    assert run("renew", str(tmp_path / "two")).returncode == 3
    assert run().returncode == run("create").returncode == run("destroy", "x").returncode == 2


def test_command_line_dials(tmp_path: Path) -> None:
    from cai.attest.gpu.ocsp_store import load_ocsp

    for name in ("one", "two"):
        made = run("create", str(tmp_path / name), "--seed", "words")
        assert "seed" in made.stdout
    assert load_ocsp(tmp_path / "one" / "anchors" / "ocsp").answers
    done = run(
        "renew", str(tmp_path / "one"), "--tcb-status", "OutOfDate",
        "--advisory", "INTEL-SA-01099", "--revoke", "GH100 A01 GSP BROM",
    )
    assert done.returncode == 0, done.stderr
    (collateral,) = (tmp_path / "one" / "anchors" / "collateral").glob("*.json")
    text = collateral.read_text()
    assert "OutOfDate" in text
    assert "INTEL-SA-01099" in text


def test_verification_never_imports_the_simulator() -> None:
    code = (
        "import sys, cai.attest.verify, cai.attest.policy, cai.attest.anchors\n"
        "sys.exit(any(name.startswith('cai.attest.sim') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
