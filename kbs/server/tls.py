"""TLS of the listeners: certificates that are read again when their files change."""

from __future__ import annotations

import ssl
from pathlib import Path

from cai.errors import InputMissing, SettingError


class Certificate:
    """A certificate chain with its key, and the context that serves them.

    Args:
        chain: PEM file, leaf first.
        key: PEM file.

    Raises:
        SettingError, InputMissing: they cannot be read, or do not belong together.
    """

    def __init__(self, chain: Path, key: Path) -> None:
        self.files = (chain, key)
        self.context = _loaded(chain, key)

    def reload(self) -> None:
        """Serve the files' present contents from the next handshake on.

        Raises:
            SettingError, InputMissing: they do not belong together; the old pair stays in use.
        """
        _loaded(*self.files)
        self.context.load_cert_chain(*self.files)


def _loaded(chain: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    # Renegotiation and compression are attack surface that no client of ours needs.
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    try:
        # An encrypted key would ask the terminal; a service has none.
        context.load_cert_chain(chain, key, password=lambda: b"")
    except FileNotFoundError as error:
        raise InputMissing(f"TLS: {chain} or {key} does not exist") from error
    except (OSError, ValueError) as error:
        # ssl.SSLError is an OSError; its text names functions of OpenSSL, not our files.
        raise SettingError(
            f"TLS: {chain} and {key} are not a PEM chain and its unencrypted key"
        ) from error
    return context
