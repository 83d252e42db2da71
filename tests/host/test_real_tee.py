"""``cai host up`` on a real host: what it collects from, in which order, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cai.attest.gpu import collect as gpu_collect
from cai.attest.tdx import collect as tdx_collect
from cai.attest.tdx.collect import MEASUREMENTS
from cai.attest.tdx.runtime_events import launch_events, replay
from cai.cli.host import _real_tee
from cai.errors import EvidenceRefused, InputMissing, Refused
from cai.host.launch import Launch
from cai.terminal import Terminal
from tests.attest.gpu.driver import Recorded
from tests.attest.tdx.kernel import FakeKernel

if TYPE_CHECKING:
    from cai.attest.evidence import QuoteSource

LAUNCH = Launch(encoded=b'{"launch":1}', settings={}, owner_key="", service_id="s")


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    made = FakeKernel(tmp_path, lambda data: b"QUOTE" + data)
    monkeypatch.setattr(tdx_collect, "LinuxFiles", lambda: made)
    return made


def register(kernel: FakeKernel) -> bytes:
    return (kernel.root / MEASUREMENTS / "rtmr3:sha384").read_bytes()


def test_the_launch_is_measured_before_anything_is_served(kernel: FakeKernel) -> None:
    source: QuoteSource
    source, devices = _real_tee(Terminal("cai"), LAUNCH, gpu=False)
    assert register(kernel) == replay(launch_events(LAUNCH.encoded))
    assert not source.simulated
    assert not devices.simulated
    assert source.quote(bytes(64)) == b"QUOTE" + bytes(64)
    assert devices.facts() == {"count": "0"}


def test_another_launch_needs_a_reboot(kernel: FakeKernel) -> None:
    _real_tee(Terminal("cai"), LAUNCH, gpu=False)
    other = Launch(encoded=b'{"launch":2}', settings={}, owner_key="", service_id="s")
    with pytest.raises(Refused, match="other events"):
        _real_tee(Terminal("cai"), other, gpu=False)


def test_gpus_that_do_not_verify_stay_closed(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Recorded()
    monkeypatch.setattr(gpu_collect, "NvmlDriver", lambda: driver)
    with pytest.raises(EvidenceRefused):
        _real_tee(Terminal("cai"), LAUNCH, gpu=True)
    assert not driver.is_ready


def test_no_tdx_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tdx_collect.LinuxFiles
    monkeypatch.setattr(tdx_collect, "LinuxFiles", lambda: real(tmp_path))
    with pytest.raises(InputMissing) as caught:
        _real_tee(Terminal("cai"), LAUNCH, gpu=False)
    assert "--doctor" in (caught.value.hint or "")
