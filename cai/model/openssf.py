"""OpenSSF model signing: bundles made and accepted by the ``model-signing`` library (an extra).

Such a bundle lists every file's name and SHA-256 in clear, so it is made of the manifest, not
stored beside the ciphertext. Nothing is hashed here: the manifest's digests are the content's once
the model was sealed or checked. Keys are those of the library's ``key`` method: ECDSA on P-256,
P-384 or P-521 in PEM.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path, PurePosixPath
from sys import stderr
from typing import Any

from cai.errors import CaiError, FormatError, InputError, Refused, UsageError, from_os_error
from cai.model.tree import Entry, EntryType

DEFAULT_NAME = "model.sig"
"""What the library calls a bundle inside a model."""

MAX_BUNDLE = 64 * 1024 * 1024
"""Largest bundle that is read, bytes."""


def write_bundle(entries: Iterable[Entry], name: str, private_key: Path, out: Path) -> None:
    """Sign the files of a manifest as ``model_signing sign key`` signs the plain tree.

    Args:
        entries: of the manifest.
        name: of the model; informative.
        private_key: EC key in PEM, unencrypted.
        out: the bundle; must not exist.

    Raises:
        InputError: the tree holds links, which the library does not sign, or the key is unusable.
        StorageError: ``out`` cannot be written.
        UsageError: the library is not installed.
    """
    signing, manifests, hashing = _library()
    files = _digests(entries)
    items = [
        manifests.FileManifestItem(
            path=PurePosixPath(path), digest=hashing.Digest("sha256", bytes.fromhex(digest))
        )
        for path, digest in sorted(files.items())
    ]
    serialization = manifests._FileSerialization("sha256")
    payload = signing.Payload(manifests.Manifest(name or "model", items, serialization))
    from model_signing._signing import sign_ec_key

    try:
        bundle = sign_ec_key.Signer(private_key).sign(payload)
    except OSError as error:
        raise from_os_error(error, f"read {private_key}") from error
    except Exception as error:  # the library raises whatever its own libraries raise
        raise InputError(
            f"{private_key} is not a key for OpenSSF model signing",
            hint="give an unencrypted EC key (P-256, P-384 or P-521) in PEM",
        ) from error
    try:
        out.touch(mode=0o644, exist_ok=False)
        bundle.write(out)
    except OSError as error:
        raise from_os_error(error, f"write {out}") from error


def verify_bundle(entries: Iterable[Entry], bundle: Path, public_key: Path) -> None:
    """Check that a bundle signs exactly the files of a manifest, by name and SHA-256.

    A file that the bundle was told to ignore, and ``model.sig`` itself, may be there as well.

    Args:
        entries: of the manifest.
        bundle: in the library's format.
        public_key: EC public key in PEM, known from elsewhere.

    Raises:
        Refused: code ``openssf``: the signature does not verify, or another tree was signed.
        InputError: bundle or key cannot be read, or the bundle signs parts of files.
        UsageError: the library is not installed.
    """
    _library()
    signed, ignored = _signed(bundle, public_key)
    found = {
        entry.path: entry.sha256 for entry in entries
        if entry.type is EntryType.FILE and not _is_ignored(entry.path, ignored)
    }
    for path in sorted({*signed, *found}):
        if signed.get(path) != found.get(path):
            reason = (
                "is not in it" if path not in signed
                else "is missing here" if path not in found else "has another SHA-256 there"
            )
            raise Refused(f"{bundle} does not sign this model: {path!r} {reason}", code="openssf")


def _signed(bundle: Path, public_key: Path) -> tuple[dict[str, str], set[str]]:
    """What a verified bundle signs: SHA-256 by path, and the paths that it ignores."""
    from model_signing import manifest as manifests
    from model_signing._signing import sign_ec_key, sign_sigstore_pb

    try:
        if bundle.stat().st_size > MAX_BUNDLE:
            raise InputError(f"{bundle}: more than {MAX_BUNDLE} bytes")
        with redirect_stdout(stderr):
            verifier = sign_ec_key.Verifier(public_key)
            signature = sign_sigstore_pb.Signature.read(bundle)
    except OSError as error:
        raise from_os_error(error, f"read {bundle} or {public_key}") from error
    except CaiError:
        raise
    except Exception as error:
        raise FormatError(f"{bundle} is not a bundle, or {public_key} not its EC key") from error
    try:
        with redirect_stdout(stderr):
            manifest = verifier.verify(signature)
        parameters = manifest.serialization_type
        digests = {}
        for item in manifest.resource_descriptors():
            digests[item.identifier] = item.digest.digest_hex
            algorithm = item.digest.algorithm
            if algorithm != "sha256" or parameters["method"] != manifests._FileSerialization.method:
                raise InputError(f"{bundle} signs parts of files, or not by SHA-256")
        return digests, {*map(str, parameters.get("ignore_paths", ())), DEFAULT_NAME}
    except CaiError:
        raise
    except Exception as error:
        raise Refused(f"the signature of {bundle} does not verify", code="openssf") from error


def _digests(entries: Iterable[Entry]) -> dict[str, str]:
    files: dict[str, str] = {}
    for entry in entries:
        if entry.type is EntryType.SYMLINK:
            raise InputError(
                f"OpenSSF model signing signs no symbolic links, and {entry.path!r} is one",
                hint="seal a tree without links",
            )
        if entry.type is EntryType.FILE and entry.path != DEFAULT_NAME:
            files[entry.path] = entry.sha256
    return files


def _is_ignored(path: str, ignored: set[str]) -> bool:
    parts = path.split("/")
    return any("/".join(parts[:count]) in ignored for count in range(1, len(parts) + 1))


def _library() -> tuple[Any, Any, Any]:
    try:
        from model_signing import manifest
        from model_signing._hashing import hashing
        from model_signing._signing import signing
    except ImportError as error:
        raise UsageError(
            "OpenSSF model signing needs the library model-signing",
            hint="pip install 'cai-confidential[signing]'",
        ) from error
    return signing, manifest, hashing
