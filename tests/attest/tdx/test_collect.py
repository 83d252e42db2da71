"""Collection through the kernel, with a kernel played by a directory and recorded quotes."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from cai.attest.evidence import QuoteSource
from cai.attest.tdx.collect import (
    CCEL_DATA,
    MEASUREMENTS,
    REPORTS,
    LinuxFiles,
    TdxGuest,
)
from cai.attest.tdx.log_records import STOP, boot_log_end, runtime_record
from cai.attest.tdx.quote import MAX_QUOTE
from cai.attest.tdx.runtime_events import launch_events, replay
from cai.errors import FormatError, InputMissing, LimitExceeded, Refused, StorageError
from tests.attest.tdx.kernel import FakeKernel

BINDING = bytes(range(64))
VECTORS = Path(os.environ.get("CAI_VECTORS", "../shared/vectors")) / "evidence" / "tdx"


def kernel(root: Path, **options: Any) -> FakeKernel:
    options.setdefault("quote", lambda data: b"QUOTE" + data)
    return FakeKernel(root, **options)


def recorded(name: str) -> bytes:
    path = VECTORS / name
    if not path.exists():
        pytest.skip(f"no shared vector {path}")
    return path.read_bytes()


def test_a_quote_is_asked_for_and_the_entry_is_gone(tmp_path: Path) -> None:
    files = kernel(tmp_path)
    source: QuoteSource = TdxGuest(files)
    assert source.quote(BINDING) == b"QUOTE" + BINDING
    assert not source.simulated
    assert source.quote(bytes(64)) == b"QUOTE" + bytes(64)
    assert len(set(files.entries)) == 2
    assert list((tmp_path / REPORTS).iterdir()) == []


def test_a_recorded_quote_comes_back_exactly(tmp_path: Path) -> None:
    quote = recorded("quotes/v4-uptodate-b0c06f.bin")
    assert TdxGuest(kernel(tmp_path, quote=lambda _data: quote)).quote(BINDING) == quote


def test_interference_is_noticed_by_generation(tmp_path: Path) -> None:
    files = kernel(tmp_path)
    files.interference = 2
    assert TdxGuest(files).quote(BINDING) == b"QUOTE" + BINDING
    assert len(files.entries) == 3
    files.interference = 3
    with pytest.raises(StorageError, match="3 times"):
        TdxGuest(files).quote(BINDING)
    assert list((tmp_path / REPORTS).iterdir()) == []


@pytest.mark.parametrize("provider", [b"sev_guest\n", b"", b"tdx_guest2", b"\xff\xfe"])
def test_another_provider_is_refused(tmp_path: Path, provider: bytes) -> None:
    with pytest.raises(Refused, match="provider"):
        TdxGuest(kernel(tmp_path, provider=provider)).quote(BINDING)
    assert list((tmp_path / REPORTS).iterdir()) == []


@pytest.mark.parametrize("size", [0, 48, 63, 65])
def test_report_data_is_64_bytes(tmp_path: Path, size: int) -> None:
    with pytest.raises(FormatError):
        TdxGuest(kernel(tmp_path)).quote(bytes(size))


def test_no_configfs(tmp_path: Path) -> None:
    with pytest.raises(InputMissing) as caught:
        TdxGuest(LinuxFiles(tmp_path)).quote(BINDING)
    assert "6.7" in (caught.value.hint or "")


def test_kernel_errors_become_ours(tmp_path: Path) -> None:
    def busy(_data: bytes) -> bytes:
        raise OSError(errno.EBUSY, "Device or resource busy")

    with pytest.raises(StorageError, match="busy"):
        TdxGuest(kernel(tmp_path, quote=busy)).quote(BINDING)
    assert list((tmp_path / REPORTS).iterdir()) == []


@pytest.mark.parametrize(("outblob", "error"), [
    (b"", StorageError), (bytes(MAX_QUOTE + 1), LimitExceeded)
])  # fmt: skip
def test_unusable_quotes(tmp_path: Path, outblob: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        TdxGuest(kernel(tmp_path, quote=lambda _data: outblob)).quote(BINDING)


@pytest.mark.parametrize("text", [b"", b"x", b"-1", b"9" * 21, b"\xb2"])
def test_generation_must_be_a_number(tmp_path: Path, text: bytes) -> None:
    files = kernel(tmp_path)
    made = files.make_directory

    def make(path: str) -> None:
        made(path)
        (tmp_path / path / "generation").write_bytes(text)

    files.make_directory = make  # type: ignore[method-assign]
    with pytest.raises(FormatError, match="generation"):
        TdxGuest(files).quote(BINDING)


def test_launch_is_measured_once(tmp_path: Path) -> None:
    files = kernel(tmp_path)
    events = launch_events(b"launch.json")
    TdxGuest(files).measure_launch(events)
    register = (tmp_path / MEASUREMENTS / "rtmr3:sha384").read_bytes()
    assert register == replay(events)
    # A restarted agent recognises its own events and extends nothing.
    again = TdxGuest(files)
    again.measure_launch(events)
    assert again.register("rtmr3") == register
    with pytest.raises(Refused, match="other events"):
        TdxGuest(files).measure_launch(launch_events(b"another launch.json"))


def test_half_a_launch_needs_a_reboot(tmp_path: Path) -> None:
    files = kernel(tmp_path)
    events = launch_events(b"launch.json")
    TdxGuest(files).measure_launch(events[:1])
    with pytest.raises(Refused, match="other events"):
        TdxGuest(files).measure_launch(events)


def test_an_old_kernel_cannot_measure(tmp_path: Path) -> None:
    with pytest.raises(InputMissing) as caught:
        TdxGuest(kernel(tmp_path, rtmr=False)).measure_launch(launch_events(b"x"))
    assert "6.16" in (caught.value.hint or "")


def test_a_register_that_does_not_move(tmp_path: Path) -> None:
    files = kernel(tmp_path)
    files.write = lambda path, data: None  # type: ignore[method-assign]
    with pytest.raises(Refused, match="not what"):
        TdxGuest(files).measure_launch(launch_events(b"x"))


def test_a_register_of_another_size(tmp_path: Path) -> None:
    files = kernel(tmp_path)
    (tmp_path / MEASUREMENTS / "rtmr3:sha384").write_bytes(bytes(47))
    with pytest.raises(FormatError, match="47"):
        TdxGuest(files).register("rtmr3")


def test_event_log_is_boot_log_and_runtime_events(tmp_path: Path) -> None:
    boot = recorded("eventlog/cos-113-ccel.bin")
    files = kernel(tmp_path)
    guest = TdxGuest(files)
    assert guest.event_log() is None
    (tmp_path / CCEL_DATA).parent.mkdir(parents=True)
    (tmp_path / CCEL_DATA).write_bytes(boot)
    assert guest.event_log() == boot[:18101] + STOP
    events = launch_events(b"launch.json")
    guest.measure_launch(events)
    log = guest.event_log()
    assert log == boot[:18101] + b"".join(map(runtime_record, events)) + STOP


def test_runtime_records_have_the_form_of_a_recorded_log() -> None:
    """The AAEL entries of an Alibaba Cloud guest, written again from their data."""
    log = recorded("eventlog/trustee-CCEL_AAEL_alibabacloud.bin")
    end = boot_log_end(log)
    assert log[end:] == STOP
    position = log.rindex(b"LEAA")
    size = int.from_bytes(log[position - 4 : position], "little")
    assert log[:end].endswith(runtime_record(log[position : position + size]))


def test_walking_a_log_cut_anywhere_raises_only_ours() -> None:
    boot = recorded("eventlog/cos-113-ccel.bin")[:18101]
    refused = 0
    for size in range(0, len(boot), 7):
        try:
            assert boot_log_end(boot[:size]) <= size
        except FormatError:
            refused += 1
    assert refused > 2000


def test_a_log_area_has_a_limit(tmp_path: Path) -> None:
    files = kernel(tmp_path)
    (tmp_path / CCEL_DATA).parent.mkdir(parents=True)
    (tmp_path / CCEL_DATA).write_bytes(bytes(1024 * 1024 + 1))
    with pytest.raises(LimitExceeded):
        TdxGuest(files).event_log()


def test_linux_files_never_create(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        LinuxFiles(tmp_path).write("absent", b"x")
    assert not (tmp_path / "absent").exists()
