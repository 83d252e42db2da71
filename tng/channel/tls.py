"""TLS 1.3 of a `cai/1` session over memory buffers (spec-channel §2).

The standard library has no exporter, so pyOpenSSL does the TLS. Certificates are checked for one
thing only, a P-256 key: the proof of §4 binds that key, and nothing else in a certificate counts.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID
from OpenSSL import SSL

from cai.errors import PeerError, PeerWithoutEvidence
from tng.channel.handshake import EXPORTER_LABEL, EXPORTER_SIZE

ALPN: Final = b"cai/1"
"""The only application protocol that is offered and accepted."""

MAX_PEER_CERTIFICATE = 100 * 1024
"""Longest certificate message of a peer, bytes: OpenSSL's default, which pyOpenSSL cannot change.
Only evidence inside a certificate comes near it; that of ``cai/1`` travels in frames."""

_READ_SIZE = 65536

_TLS_1_3 = 0x0304
"""Protocol version number (RFC 8446 §4.2.1)."""


class NoCommonProtocol(Exception):
    """Raised inside the ALPN callback, which makes OpenSSL send alert 120 and end the handshake."""


class ChannelKey:
    """A P-256 key with its self-signed certificate; lives in this process's memory only."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cai/1")])
        now = dt.datetime.now(dt.UTC)
        self._certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=3650))
            .sign(self._key, hashes.SHA256())
        )
        self.spki: bytes = _spki(self._key.public_key())

    def __repr__(self) -> str:
        return "<channel key>"

    def install(self, context: SSL.Context) -> None:
        """Make a context present this key."""
        context.use_privatekey(self._key)
        context.use_certificate(self._certificate)


def server_context(key: ChannelKey, *, demand: bool = False) -> SSL.Context:
    """The context of an egress: TLS 1.3, ALPN ``cai/1`` or alert 120, nothing to resume.

    Args:
        key: what it presents.
        demand: ask the client for a certificate as well. One without is not ended by TLS: it is
            refused with a reason that can be read.
    """
    context = new_context()
    key.install(context)
    context.set_alpn_select_callback(_select)
    if demand:
        context.set_verify(SSL.VERIFY_PEER, _any)
    return context


def client_context(key: ChannelKey | None = None) -> SSL.Context:
    """The context of an ingress. Any certificate passes here: the proof decides.

    Args:
        key: what it presents where the egress asks; ``None`` presents nothing.
    """
    context = new_context()
    context.set_alpn_protos([ALPN])
    if key is not None:
        key.install(context)
    return context


class SessionClosed(PeerError):
    """The peer ended its direction properly, with close_notify."""

    code = "session-closed"


class TlsSession:
    """One end of one TLS session; bytes in, bytes out.

    Args:
        context: of ``server_context`` or ``client_context``.
        server: which end this is.
        server_name: SNI of the client's end; none for an IP address.
        protocols: ALPN names of which one must have been chosen; an empty one stands for none.
    """

    def __init__(
        self,
        context: SSL.Context,
        *,
        server: bool,
        server_name: str | None = None,
        protocols: Sequence[bytes] = (ALPN,),
    ) -> None:
        self._tls = SSL.Connection(context, None)
        self._protocols = protocols
        if server:
            self._tls.set_accept_state()
        else:
            self._tls.set_connect_state()
            if server_name:
                self._tls.set_tlsext_host_name(server_name.encode("ascii", "ignore"))
        self.established = False
        self.ended = False

    def start(self) -> None:
        """Make the client's first flight."""
        self._advance()

    def receive(self, data: bytes) -> bytes:
        """Take ciphertext, return the plaintext that it completes.

        Raises:
            PeerWithoutEvidence: the peer does TLS, but not as spec-channel §2 demands.
            PeerError: the session is broken, or the peer has closed it.
        """
        self._tls.bio_write(data)
        if not self.established:
            self._advance()
        if not self.established:
            return b""
        parts: list[bytes] = []
        while True:
            try:
                parts.append(self._tls.recv(_READ_SIZE))
            except SSL.WantReadError:
                return parts[0] if len(parts) == 1 else b"".join(parts)
            except SSL.ZeroReturnError as error:
                self.ended = True
                if parts:
                    # What came before the close is still delivered.
                    return b"".join(parts)
                raise SessionClosed("the peer closed the session") from error
            except SSL.Error as error:
                raise PeerError(f"TLS: {_describe(error)}") from error

    def send(self, data: bytes) -> None:
        """Encrypt; ``outgoing`` then has the ciphertext.

        Raises:
            PeerError: the session is broken.
        """
        view = memoryview(data)
        try:
            while view:
                view = view[self._tls.send(view) :]
        except SSL.Error as error:
            raise PeerError(f"TLS: {_describe(error)}") from error

    def outgoing(self) -> bytes:
        """Ciphertext to put on the wire."""
        parts: list[bytes] = []
        while True:
            try:
                part = self._tls.bio_read(_READ_SIZE)
            except SSL.Error:
                return b"".join(parts)
            parts.append(part)
            # A short one was the last; asking again costs an exception.
            if len(part) < _READ_SIZE:
                return part if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Make a close_notify, if the session can still say so."""
        try:
            self._tls.shutdown()
        except SSL.Error:
            return

    def export(self, context: bytes) -> bytes:
        """The session's exporter value under the channel's label (spec-channel §4 step 3)."""
        return self._tls.export_keying_material(EXPORTER_LABEL, EXPORTER_SIZE, context)

    @property
    def protocol(self) -> bytes:
        """The ALPN name that was chosen; empty when none was."""
        return self._tls.get_alpn_proto_negotiated()

    def peer_certificate(self) -> bytes | None:
        """The certificate that the peer presented, DER."""
        certificate = self._tls.get_peer_certificate(as_cryptography=True)
        return certificate.public_bytes(Encoding.DER) if certificate else None

    def peer_spki(self) -> bytes:
        """DER SubjectPublicKeyInfo of the certificate that the peer presented.

        Raises:
            PeerWithoutEvidence: no certificate, or its key is not on P-256.
        """
        certificate = self._tls.get_peer_certificate(as_cryptography=True)
        try:
            key = certificate.public_key() if certificate else None
        except (ValueError, TypeError) as error:
            raise PeerWithoutEvidence("the peer's certificate cannot be read") from error
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
            raise PeerWithoutEvidence("the peer's certificate holds no P-256 key")
        return _spki(key)

    def _advance(self) -> None:
        try:
            self._tls.do_handshake()
        except SSL.WantReadError:
            return
        except NoCommonProtocol as error:
            raise PeerWithoutEvidence(
                "the peer offers TLS without a protocol of this gateway"
            ) from error
        except SSL.Error as error:
            raise _handshake_error(error) from error
        # A peer without ALPN passes OpenSSL's own handshake; here it does not.
        if self.protocol not in self._protocols:
            names = " or ".join(name.decode("ascii") for name in self._protocols if name)
            raise PeerWithoutEvidence(f"the peer speaks TLS, but not {names}")
        if self._tls.get_protocol_version() != _TLS_1_3:
            raise PeerWithoutEvidence("the peer speaks an older TLS")
        self.established = True


def new_context() -> SSL.Context:
    """TLS 1.3 only, nothing to resume, no early data."""
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_max_proto_version(SSL.TLS1_3_VERSION)
    context.set_options(SSL.OP_NO_TICKET | SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION)
    # Tickets are sent in spite of OP_NO_TICKET; without a cache none of them resumes anything.
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    return context


def _any(_connection: SSL.Connection, _certificate: object, *_rest: object) -> bool:
    return True


def _select(_connection: SSL.Connection, offered: Sequence[bytes]) -> bytes:
    if ALPN not in offered:
        raise NoCommonProtocol
    return ALPN


def _spki(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _handshake_error(error: SSL.Error) -> PeerError:
    text = _describe(error)
    if "wrong version number" in text or "packet length too long" in text or "http" in text:
        return PeerWithoutEvidence("the peer answers in plain text, not in TLS")
    if "excessive message size" in text:
        return PeerWithoutEvidence(
            f"the peer's certificate is longer than {MAX_PEER_CERTIFICATE} bytes",
            hint="a guest with many GPUs proves itself over cai/1, or shows a passport",
        )
    return PeerWithoutEvidence(f"the peer does not complete the TLS handshake ({text})")


def _describe(error: SSL.Error) -> str:
    """OpenSSL's own reason: the last entry of its error queue, or what the system said."""
    queue = error.args[0] if error.args else None
    if isinstance(queue, list) and queue:
        return str(queue[-1][-1]) or "unknown error"
    return str(error.args[-1]) if error.args else "unknown error"
