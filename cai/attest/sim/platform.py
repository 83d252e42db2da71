"""The simulated machine as the rest of CAI meets it: a quote source and a device source."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha384
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from cai import jcs
from cai.attest.anchors import COLLATERAL_DIRECTORY, GPU_ROOT_FILE, TDX_ROOT_FILE
from cai.attest.evidence import DeviceEvidence
from cai.attest.sim import intel, nvidia
from cai.attest.sim.certificates import Identity
from cai.attest.statement import REPORT_DATA_SIZE
from cai.errors import FormatError, InputError, InputMissing, StorageError, from_os_error
from cai.secret import Secret, read_secret_file, write_secret_file

ANCHORS = "anchors"
PLATFORM = "platform"
"""Directories of a simulated platform: what verifiers get, and what plays the hardware."""

MAX_GPUS = 8
"""GPUs that a simulated machine has."""

NORMAL_ATTRIBUTES = 1 << 28
DEBUG_ATTRIBUTE = 1 << 0
XFAM = bytes.fromhex("e702060000000000")

_INTEL = ("root", "platform_ca", "tcb_signing", "pck")
_NVIDIA = ("root", "identity", "provisioner")


@dataclass(frozen=True, slots=True)
class GuestSettings:
    """What a simulated guest is like.

    Attributes:
        image: mr_td and rtmr0 to rtmr2 are derived from it: another image, other measurements.
        debug: started as a debug guest.
        rtmr3_events: extended into rtmr3 in order, each as its SHA-384.
        quote_seconds: how long a quote takes; quotes of one platform never overlap.
    """

    image: str = "demo"
    debug: bool = False
    rtmr3_events: tuple[bytes, ...] = ()
    quote_seconds: float = 0.0


class SimulatedPlatform:
    """A simulated machine, made by ``create`` and opened by ``load``."""

    def __init__(
        self,
        directory: Path,
        processor: intel.Processor,
        foundry: nvidia.Foundry,
        gpus: Sequence[nvidia.Gpu],
    ) -> None:
        self.directory = directory
        self.processor = processor
        self.foundry = foundry
        self.gpus = tuple(gpus)
        self.qe_id = sha384(b"SIMULATED qe id" + processor.pck.pem).digest()[:16]
        # The quoting enclave serves one request at a time, whichever guest asks.
        self.quoting = threading.Lock()

    @property
    def anchors(self) -> Path:
        """The public directory that verifiers get."""
        return self.directory.parent / ANCHORS

    @classmethod
    def create(cls, directory: Path, *, now: datetime) -> SimulatedPlatform:
        """Make ``directory/anchors`` (public) and ``directory/platform`` (0700).

        Raises:
            StorageError: something stands there already, or cannot be written.
        """
        platform = directory / PLATFORM
        anchors = directory / ANCHORS
        try:
            directory.mkdir(parents=True, exist_ok=True)
            platform.mkdir(mode=0o700)
            (anchors / COLLATERAL_DIRECTORY).mkdir(parents=True)
        except FileExistsError as error:
            raise StorageError(
                f"a simulated platform exists already in {directory}",
                hint="choose another directory, or renew this one",
            ) from error
        except OSError as error:
            raise from_os_error(error, f"create simulated platform {directory}") from error
        foundry = nvidia.create_foundry(now=now)
        made = cls(
            platform,
            intel.create_processor(
                ppid=secrets.token_bytes(16), instance_id=secrets.token_bytes(16), now=now
            ),
            foundry,
            [nvidia.create_gpu(foundry, now=now) for _ in range(MAX_GPUS)],
        )
        made._save()
        _write_public(anchors / TDX_ROOT_FILE, made.processor.root.pem)
        _write_public(anchors / GPU_ROOT_FILE, made.foundry.root.pem)
        made.renew_collateral(now=now)
        return made

    @classmethod
    def load(cls, directory: Path) -> SimulatedPlatform:
        """Open a platform from its private directory.

        Args:
            directory: ``DIR/platform``; ``DIR`` itself is understood as well.

        Raises:
            InputMissing, InputError, StorageError: there is none, or it cannot be read.
            FormatError: a file in it is damaged.
        """
        if not directory.exists():
            raise InputMissing(
                f"simulated platform {directory} does not exist",
                hint="make one: python -m cai.attest.sim create DIR",
            )
        inner = directory / PLATFORM
        place = inner if inner.is_dir() else directory
        if not (place / "intel-root.key").exists():
            raise InputError(f"{directory} is not a simulated platform")
        return cls(
            place,
            intel.Processor(
                **{name: _load(place, f"intel-{name}") for name in _INTEL},
                attestation_key=_load_key(place / "attestation.key"),
            ),
            nvidia.Foundry(**{name: _load(place, f"nvidia-{name}") for name in _NVIDIA}),
            [
                nvidia.Gpu(_load(place, f"gpu{number}-rom"), _load(place, f"gpu{number}-leaf"))
                for number in range(MAX_GPUS)
            ],
        )

    def renew_collateral(self, *, now: datetime) -> Path:
        """Write fresh collateral, valid for 30 days, over the old.

        Returns:
            The collateral directory.

        Raises:
            StorageError: it cannot be written.
        """
        members = intel.collateral(self.processor, now=now)
        path = self.anchors / COLLATERAL_DIRECTORY / f"{intel.FMSPC.hex()}-platform.json"
        _write_public(path, jcs.canonical(members))
        return path.parent

    def guest(self, settings: GuestSettings) -> SimulatedGuest:
        """Start a guest on this platform."""
        return SimulatedGuest(self, settings)

    def devices(self, count: int = 1) -> SimulatedDevices:
        """The platform's first ``count`` GPUs.

        Raises:
            InputError: there are not that many.
        """
        if not 0 <= count <= len(self.gpus):
            raise InputError(f"a simulated platform has up to {len(self.gpus)} GPUs, not {count}")
        return SimulatedDevices(self, count)

    def _save(self) -> None:
        processor, foundry = self.processor, self.foundry
        named = {f"intel-{name}": getattr(processor, name) for name in _INTEL}
        named |= {f"nvidia-{name}": getattr(foundry, name) for name in _NVIDIA}
        for number, gpu in enumerate(self.gpus):
            named |= {f"gpu{number}-rom": gpu.boot_rom, f"gpu{number}-leaf": gpu.leaf}
        for name, identity in named.items():
            _write_key(self.directory / f"{name}.key", identity.key_pem)
            _write_public(self.directory / f"{name}.pem", identity.pem)
        attestation = processor.attestation_key.private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        )
        _write_key(self.directory / "attestation.key", attestation)


class SimulatedGuest:
    """A simulated TDX guest; a ``QuoteSource``."""

    simulated = True

    def __init__(self, platform: SimulatedPlatform, settings: GuestSettings) -> None:
        self.settings = settings
        self._platform = platform
        self._rtmr3 = bytes(48)
        for event in settings.rtmr3_events:
            self.extend_rtmr3(event)

    def extend_rtmr3(self, event: bytes) -> None:
        """Extend rtmr3 with the SHA-384 of an event, as a running guest does."""
        self._rtmr3 = sha384(self._rtmr3 + sha384(event).digest()).digest()

    @property
    def measurements(self) -> dict[str, str]:
        """mr_td and rtmr0 to rtmr3 in hex, by the names of ``policy.toml``."""
        named = {name: self._measure(name).hex() for name in ("mr_td", "rtmr0", "rtmr1", "rtmr2")}
        return {**named, "rtmr3": self._rtmr3.hex()}

    def quote(self, report_data: bytes) -> bytes:
        """A version 4 quote over exactly these 64 bytes.

        Raises:
            FormatError: the report data is not 64 bytes.
        """
        if len(report_data) != REPORT_DATA_SIZE:
            raise FormatError(f"report data of {len(report_data)} bytes, expected 64")
        with self._platform.quoting:
            if self.settings.quote_seconds > 0:
                time.sleep(self.settings.quote_seconds)
            return intel.make_quote(
                self._platform.processor, body=self._body(report_data), qe_id=self._platform.qe_id
            )

    def event_log(self) -> bytes | None:
        """A simulated guest keeps no event log yet."""
        return None

    def _measure(self, register: str) -> bytes:
        return sha384(f"SIMULATED {register} of {self.settings.image}".encode()).digest()

    def _body(self, report_data: bytes) -> bytes:
        attributes = NORMAL_ATTRIBUTES | (DEBUG_ATTRIBUTE if self.settings.debug else 0)
        return b"".join(
            (
                intel.TEE_TCB_SVN,
                intel.MR_SEAM,
                bytes(48),  # mr_signer_seam: zero is Intel's
                bytes(8),  # seam_attributes
                attributes.to_bytes(8, "little"),
                XFAM,
                self._measure("mr_td"),
                bytes(3 * 48),  # mr_config_id, mr_owner, mr_owner_config
                self._measure("rtmr0"),
                self._measure("rtmr1"),
                self._measure("rtmr2"),
                self._rtmr3,
                report_data,
            )
        )


class SimulatedDevices:
    """The simulated GPUs of a guest; a ``DeviceSource``."""

    simulated = True

    def __init__(self, platform: SimulatedPlatform, count: int) -> None:
        self._platform = platform
        self._gpus = platform.gpus[:count]

    def collect(self, nonce: bytes) -> tuple[DeviceEvidence, ...]:
        """Reports of all devices under one 32-byte nonce.

        Raises:
            FormatError: the nonce is not 32 bytes.
        """
        if len(nonce) != 32:
            raise FormatError(f"GPU nonce of {len(nonce)} bytes, expected 32")
        return tuple(
            DeviceEvidence(
                arch=nvidia.ARCH,
                uuid=f"GPU-SIMULATED-{number}",
                report=nvidia.make_report(gpu, nonce),
                chain=nvidia.chain(self._platform.foundry, gpu),
            )
            for number, gpu in enumerate(self._gpus)
        )

    def facts(self) -> dict[str, str]:
        """Guest facts about the devices."""
        return {
            "cc_feature": "on",
            "devtools": "off",
            "multi_gpu_mode": "none",
            "count": str(len(self._gpus)),
            "driver": nvidia.DRIVER_VERSION,
        }


def _write_key(path: Path, pem: bytes) -> None:
    write_secret_file(path, Secret(pem), what="simulated key")


def _write_public(path: Path, data: bytes) -> None:
    """Write through a temporary name, so that a reader never meets half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise from_os_error(error, f"write {path}") from error


def _load(directory: Path, name: str) -> Identity:
    key = read_secret_file(directory / f"{name}.key", what="simulated key")
    certificate = read_secret_file(directory / f"{name}.pem", what="simulated certificate")
    return Identity.load(key.reveal(), certificate.reveal(), what=name)


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    pem = read_secret_file(path, what="simulated key").reveal()
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError) as error:
        raise FormatError(f"{path}: not a key") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise FormatError(f"{path}: not an elliptic-curve key")
    return key
