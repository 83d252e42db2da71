"""The simulated machine as the rest of CAI meets it: where guests and devices come from.

A platform is a seed and a time of making; every key and certificate follows from these two, so a
loaded platform is the hardware that was created, and two of one seed and time are the same.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import cache, cached_property
from hashlib import sha384
from itertools import count
from pathlib import Path

from cai import jcs
from cai.attest.anchors import (
    COLLATERAL_DIRECTORY,
    GPU_ROOT_FILE,
    RIM_ROOT_FILE,
    TDX_ROOT_FILE,
)
from cai.attest.sim import intel, nvidia, rim
from cai.attest.sim.devices import MAX_GPUS, MAX_SWITCHES, DeviceSettings, SimulatedDevices
from cai.attest.sim.guest import GuestSettings, SimulatedGuest
from cai.attest.sim.revocation import OcspSettings, Responder
from cai.attest.sim.seed import Seed
from cai.attest.sim.tcb import CollateralSettings
from cai.errors import FormatError, InputError, InputMissing, StorageError, from_os_error
from cai.secret import Secret, read_secret_file, write_secret_file

ANCHORS = "anchors"
PLATFORM = "platform"
"""Directories of a simulated platform: what verifiers get, and what plays the hardware."""

RIM_DIRECTORY = "rims"
OCSP_DIRECTORY = "ocsp"
"""Reference files and revocation answers, beside the collateral in the public directory."""

SEED_FILE = "seed.key"
DESCRIPTION_FILE = "platform.json"
"""The private files of a platform: its seed, and what is not secret about it."""

FORMAT = 2
"""Version of the private directory's format."""


class SimulatedPlatform:
    """A simulated machine, made by ``create`` and opened by ``load``.

    Args:
        directory: the private directory.
        seed: where every key comes from.
        made: time of the making.
        pck_flags: those that the PCK certificate sets (``intel.PCK_FLAGS``).
    """

    def __init__(
        self,
        directory: Path,
        seed: Seed,
        made: datetime,
        pck_flags: tuple[str, ...] = intel.PCK_FLAGS,
    ) -> None:
        self.directory = directory
        self.made = made
        self.pck_flags = pck_flags
        self._seed = seed
        self._device = cache(self._make_device)
        self._reports = count()
        # The quoting enclave serves one request at a time, whichever guest asks.
        self.quoting = threading.Lock()

    @property
    def anchors(self) -> Path:
        """The public directory that verifiers get."""
        return self.directory.parent / ANCHORS

    @cached_property
    def processor(self) -> intel.Processor:
        """The machine's package, with the vendor behind it."""
        return intel.create_processor(
            ppid=self._seed.bytes("ppid", 16),
            instance_id=self._seed.bytes("platform instance", 16),
            now=self.made,
            seed=self._seed.below("intel"),
            flags=self.pck_flags,
        )

    @cached_property
    def foundry(self) -> nvidia.Foundry:
        """The vendor of the machine's GPUs."""
        return nvidia.create_foundry(now=self.made, seed=self._seed.below("nvidia"))

    @property
    def gpus(self) -> tuple[nvidia.Gpu, ...]:
        """The machine's GH100 devices."""
        return tuple(self.device(nvidia.ARCH, place) for place in range(MAX_GPUS))

    @cached_property
    def qe_id(self) -> bytes:
        """16 bytes that name the quoting enclave."""
        return sha384(b"SIMULATED qe id" + self.processor.pck.pem).digest()[:16]

    @classmethod
    def create(
        cls,
        directory: Path,
        *,
        now: datetime,
        seed: bytes | None = None,
        pck_flags: tuple[str, ...] = intel.PCK_FLAGS,
        collateral: CollateralSettings | None = None,
    ) -> SimulatedPlatform:
        """Make ``directory/anchors`` (public) and ``directory/platform`` (0700).

        Args:
            directory: where.
            now: time of the making.
            seed: makes the platform repeatable; drawn when absent. Whoever knows it can sign for
                the platform.
            pck_flags: flags that the PCK certificate sets.
            collateral: what the simulated Intel says of the platform.

        Raises:
            InputError: an unknown PCK flag.
            StorageError: something stands there already, or cannot be written.
        """
        platform, anchors = directory / PLATFORM, directory / ANCHORS
        if not set(pck_flags) <= set(intel.PCK_FLAGS):
            raise InputError(f"known PCK flags are: {', '.join(intel.PCK_FLAGS)}")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            platform.mkdir(mode=0o700)
            for name in (COLLATERAL_DIRECTORY, RIM_DIRECTORY, OCSP_DIRECTORY):
                (anchors / name).mkdir(parents=True)
        except FileExistsError as error:
            raise StorageError(
                f"a simulated platform exists already in {directory}",
                hint="choose another directory, or renew this one",
            ) from error
        except OSError as error:
            raise from_os_error(error, f"create simulated platform {directory}") from error
        source = Seed.fresh() if seed is None else Seed(seed)
        made = cls(platform, source, now.astimezone(UTC).replace(microsecond=0), pck_flags)
        made._save()
        made.renew_collateral(now=now, settings=collateral)
        made.renew_answers(now=now)
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
        if not (place / DESCRIPTION_FILE).exists():
            raise InputError(
                f"{directory} is not a simulated platform of this version",
                hint="make one: python -m cai.attest.sim create DIR",
            )
        seed = read_secret_file(place / SEED_FILE, what="simulated seed").reveal()
        text = read_secret_file(place / DESCRIPTION_FILE, what="simulated platform").reveal()
        made, flags = _described(text, str(place / DESCRIPTION_FILE))
        return cls(place, Seed(_unhex(seed, str(place / SEED_FILE))), made, flags)

    def renew_collateral(
        self, *, now: datetime, settings: CollateralSettings | None = None
    ) -> Path:
        """Write collateral anew, over the old.

        Args:
            now: time of its making.
            settings: the dials; by default everything is in order for 30 days.

        Returns:
            The collateral directory.

        Raises:
            StorageError: it cannot be written.
        """
        members = intel.collateral(self.processor, now=now, settings=settings)
        path = self.anchors / COLLATERAL_DIRECTORY / f"{intel.FMSPC.hex()}-platform.json"
        _write_public(path, jcs.canonical(members))
        return path.parent

    def renew_answers(self, *, now: datetime, settings: OcspSettings | None = None) -> Path:
        """Write the revocation answers anew: one for each certificate that can be asked about.

        Returns:
            The directory of answers.

        Raises:
            StorageError: it cannot be written.
        """
        responder = self.responder(settings)
        directory = self.anchors / OCSP_DIRECTORY
        for serial, (certificate, _issuer) in responder.links.items():
            answer = responder.about(certificate, now=now)
            _write_public(directory / f"{serial:040x}.der", answer)
        return directory

    def guest(self, settings: GuestSettings) -> SimulatedGuest:
        """Start a guest on this platform."""
        return SimulatedGuest(self, settings)

    def devices(self, count: int = 1, settings: DeviceSettings | None = None) -> SimulatedDevices:
        """The platform's first ``count`` GPUs, and its switches where settings say so.

        Raises:
            InputError: there are not that many.
        """
        return SimulatedDevices(self, count, settings)

    def device(self, arch: str, place: int) -> nvidia.Gpu:
        """One device of a kind (``HOPPER``, ``BLACKWELL``, ``LS10``), by its place."""
        return self._device(arch, place)

    def pdi(self, arch: str, place: int) -> bytes:
        """The physical identity of a device, 8 bytes, as switches list it."""
        return nvidia.pdi(self._device_seed(arch, place))

    def next_responder_nonce(self) -> bytes:
        """What a device adds to its next report, 32 bytes; in order, so that a seed repeats it."""
        return self._seed.bytes(f"report {next(self._reports)}", 32)

    def foreign_device(self, chip: nvidia.Chip) -> tuple[nvidia.Foundry, nvidia.Gpu]:
        """A device of another vendor root, and that vendor."""
        foundry = nvidia.create_foundry(now=self.made, seed=self._seed.below("foreign"))
        seed = self._seed.below("foreign device")
        return foundry, nvidia.create_gpu(foundry, now=self.made, chip=chip, seed=seed)

    def expired_device(self, chip: nvidia.Chip, place: int) -> nvidia.Gpu:
        """A device whose leaf certificate is no longer valid."""
        return nvidia.create_gpu(
            self.foundry, now=self.made, chip=chip, lifetime=-timedelta(days=1),
            seed=self._device_seed(chip.arch, place),
        )  # fmt: skip

    def responder(self, settings: OcspSettings | None = None) -> Responder:
        """The vendor's OCSP responder."""
        built_in = [self.device(arch, place) for arch, place in _built_in()]
        return Responder.of(self.foundry, built_in, settings)

    def rims(self) -> Mapping[str, bytes]:
        """Reference files by the id under which the vendor's service gives them."""
        return self._rims

    @cached_property
    def _rims(self) -> Mapping[str, bytes]:
        found: dict[str, bytes] = {}
        for chip in nvidia.CHIPS.values():
            if chip.arch != "LS10":
                name = rim.rim_id(chip, nvidia.DRIVER_VERSION, driver=True)
                found[name] = rim.driver_rim(self.foundry, chip)
            name = rim.rim_id(chip, chip.vbios_version, driver=False)
            found[name] = rim.vbios_rim(self.foundry, chip)
        return found

    def _make_device(self, arch: str, place: int) -> nvidia.Gpu:
        return nvidia.create_gpu(
            self.foundry, now=self.made, chip=nvidia.CHIPS[arch],
            seed=self._device_seed(arch, place),
        )  # fmt: skip

    def _device_seed(self, arch: str, place: int) -> Seed:
        return self._seed.below(f"device {arch} {place}")

    def _save(self) -> None:
        write_secret_file(
            self.directory / SEED_FILE, Secret(self._seed.value.hex().encode()), what="seed"
        )
        description = {
            "format": FORMAT,
            "made": self.made.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "pck_flags": list(self.pck_flags),
        }
        _write_public(self.directory / DESCRIPTION_FILE, jcs.canonical(description))
        _write_public(self.anchors / TDX_ROOT_FILE, self.processor.root.pem)
        _write_public(self.anchors / GPU_ROOT_FILE, self.foundry.root.pem)
        _write_public(self.anchors / RIM_ROOT_FILE, self.foundry.rim_root.pem)
        for name, document in self.rims().items():
            _write_public(self.anchors / RIM_DIRECTORY / f"{name}.xml", document)


def _built_in() -> list[tuple[str, int]]:
    return [
        (arch, place)
        for arch in nvidia.CHIPS
        for place in range(MAX_SWITCHES if arch == "LS10" else MAX_GPUS)
    ]


def _described(text: bytes, where: str) -> tuple[datetime, tuple[str, ...]]:
    value = jcs.parse(text, what=where, limit=4096)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise FormatError(f"{where}: not a simulated platform of format {FORMAT}")
    try:
        made = datetime.fromisoformat(str(value.get("made")))
    except ValueError as error:
        raise FormatError(f"{where}: made is not a time") from error
    flags = value.get("pck_flags")
    if made.tzinfo is None or not isinstance(flags, list):
        raise FormatError(f"{where}: made or pck_flags is missing")
    return made, tuple(str(flag) for flag in flags)


def _unhex(text: bytes, where: str) -> bytes:
    try:
        return bytes.fromhex(text.decode("ascii"))
    except ValueError as error:
        raise FormatError(f"{where}: not hex") from error


def _write_public(path: Path, data: bytes) -> None:
    """Write through a temporary name, so that a reader never meets half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise from_os_error(error, f"write {path}") from error
