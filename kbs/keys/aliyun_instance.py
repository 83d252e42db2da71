"""A KMS instance of Alibaba Cloud, reached by the official SDK in a child process.

The child (``aliyun_child.py``) runs under an interpreter that a setting names, in isolated mode and
with an empty environment. It gets its settings and every order over its standard input and is
replaced when it dies or does not answer in time.
"""

from __future__ import annotations

import base64
import binascii
import json
import selectors
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cai import jcs
from cai.errors import CaiError, FormatError, SettingError, Tampered, Unavailable
from cai.settings import Section
from kbs.keys.aliyun import TIMEOUT_SECONDS, KmsRefusal, KmsSecret, secret_of
from kbs.keys.secret_input import SecretInput

CHILD: Final = Path(__file__).with_name("aliyun_child.py")
"""The program of the child."""

ANSWER_SECONDS: Final = 2 * TIMEOUT_SECONDS + 5
"""How long one answer of the child may take, seconds; its own time-outs end before."""

MAX_ANSWER: Final = 256 * 1024
"""Longest answer, bytes."""

_ENDPOINT: Final = "{}.cryptoservice.kms.aliyuncs.com"


@dataclass(frozen=True, slots=True)
class InstanceSettings:
    """A KMS instance.

    Attributes:
        endpoint: its address, without a scheme.
        client_key: content of the client key file that its application access point gave.
        password: of that client key.
        ca_file: the instance's CA certificate.
        python: interpreter that has ``alibabacloud-dkms-gcs``.
        plain_http: for a simulator on a loopback address.
    """

    endpoint: str
    client_key: SecretInput
    password: SecretInput
    ca_file: Path | None
    python: Path
    plain_http: bool = False


def instance_from_section(section: Section) -> InstanceKms:
    """Read ``instance`` or ``endpoint``, ``client_key_file``, ``password_file``, ``ca_file``,
    ``python``.

    Raises:
        SettingError: a member is missing or of another form.
    """  # noqa: D205
    instance = section.text("instance", "")
    endpoint = section.text("endpoint", _ENDPOINT.format(instance) if instance else "")
    plain = section.flag("unsafe_plain_http", default=False)
    ca_file = section.text("ca_file", "")
    if not endpoint or "/" in endpoint or not (ca_file or plain):
        raise SettingError(
            f"{section.where}: a KMS instance needs instance, client_key_file, password_file,"
            " ca_file and python"
        )
    if plain and not endpoint.startswith(("127.0.0.1:", "localhost:")):
        raise SettingError(f"{section.where}: plain HTTP is for a loopback address only")
    return InstanceKms(
        InstanceSettings(
            endpoint,
            SecretInput.from_section(section, "client_key", what="client key"),
            SecretInput.from_section(section, "password", what="client key's password"),
            Path(ca_file) if ca_file else None,
            Path(section.text("python")),
            plain,
        )
    )


class InstanceKms:
    """See ``kbs.keys.aliyun.Kms``.

    Args:
        settings: the instance and the interpreter.
    """

    def __init__(self, settings: InstanceSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def encrypt(self, key: str, plaintext: bytes) -> bytes:
        """See ``Kms``; what decryption needs is canonical JSON."""
        data = base64.b64encode(plaintext).decode("ascii")
        answer = self._ask({"op": "encrypt", "key": key, "data": data})
        sealed = answer.get("sealed")
        if not isinstance(sealed, dict) or set(sealed) != {"blob", "iv", "algorithm", "padding"}:
            raise FormatError("the KMS child's answer lacks a member")
        return jcs.canonical(sealed)

    def decrypt(self, key: str, sealed: bytes) -> bytes:
        """See ``Kms``."""
        try:
            value = jcs.parse_canonical(sealed, what="wrapped key", limit=len(sealed) + 1)
        except CaiError as error:
            raise Tampered("a key wrapped by a KMS instance has another form") from error
        answer = self._ask({"op": "decrypt", "key": key, "sealed": value})
        try:
            return base64.b64decode(str(answer.get("data")), validate=True)
        except (binascii.Error, ValueError) as error:
            raise FormatError("the KMS child's answer is not base64") from error

    def secret(self, name: str) -> KmsSecret:
        """See ``Kms``."""
        answer = self._ask({"op": "secret", "name": name})
        return secret_of(answer.get("data"), answer.get("kind"), answer.get("version"))

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._end()

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            child = self._running()
            answer = self._exchange(child, order)
        if "refused" in answer:
            raise KmsRefusal(str(answer["refused"])[:128])
        if "failed" in answer:
            raise _unavailable(str(answer["failed"])[:64])
        return answer

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self._end()
        settings = self._settings
        try:
            child = self._child = subprocess.Popen(
                [str(settings.python), "-I", str(CHILD)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env={"LC_ALL": "C.UTF-8"}, cwd="/",
            )  # fmt: skip
        except OSError as error:
            raise SettingError(
                f"the interpreter {settings.python} for the KMS instance does not start",
                hint="make one with alibabacloud-dkms-gcs; see docs/kbs-keys.md",
            ) from error
        first = {
            "protocol": "http" if settings.plain_http else "https",
            "endpoint": settings.endpoint,
            "client_key": settings.client_key.read().reveal().decode("utf-8", "replace"),
            "password": settings.password.read().reveal().decode("utf-8", "replace"),
            "ca_file": "" if settings.ca_file is None else str(settings.ca_file.absolute()),
            "timeout_ms": 1000 * TIMEOUT_SECONDS,
        }
        answer = self._exchange(child, first)
        if answer.get("ready") is not True:
            self._end()
            raise SettingError(
                f"the KMS child does not start: {str(answer.get('failed'))[:64]}",
                hint="ModuleNotFoundError: install alibabacloud-dkms-gcs for that interpreter;"
                " else check client key and password",
            )
        return child

    def _exchange(self, child: subprocess.Popen[bytes], order: dict[str, Any]) -> dict[str, Any]:
        assert child.stdin is not None  # noqa: S101 - opened as a pipe
        assert child.stdout is not None  # noqa: S101
        try:
            child.stdin.write(json.dumps(order).encode("utf-8") + b"\n")
            child.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(child.stdout, selectors.EVENT_READ)
                line = b""
                if selector.select(ANSWER_SECONDS):
                    line = child.stdout.readline(MAX_ANSWER)
            answer = json.loads(line)
        except (OSError, ValueError) as error:
            self._end()
            raise _unavailable("its child process ended or did not answer") from error
        if not isinstance(answer, dict):
            self._end()
            raise FormatError("the KMS child's answer is not an object")
        return answer

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue  # what was not sent is of no use any more


def _unavailable(reason: str) -> Unavailable:
    return Unavailable(
        f"the KMS instance is not available: {reason}",
        hint="check endpoint, credentials and network; nothing was changed",
        code="keys-unavailable",
    )
