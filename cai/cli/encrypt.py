"""``cai encrypt``: seal a model, and put its key where its owner wants it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cai.cli.key_files import drop_staged
from cai.cli.model_keys import ModelKeys
from cai.errors import LimitExceeded, UsageError
from cai.settings import read_settings_file
from cai.terminal import JsonFlag, Terminal, current

if TYPE_CHECKING:
    from cai.model import Manifest, SealedModel, SealOptions, SealReport

_LATER = {
    "sam": ("method sam is a closed format of another vendor", "use --method cai"),
}


def encrypt(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Directory that holds the model.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Where the sealed model appears (default: DIR.sealed)."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(help="How it is sealed: cai, or gocryptfs, which stock gocryptfs mounts."),
    ] = "cai",
    key_out: Annotated[
        Path | None, typer.Option(help="Write a new key to this file (default: DIR.key).")
    ] = None,
    key_file: Annotated[Path | None, typer.Option(help="Seal with the key in this file.")] = None,
    password_file: Annotated[
        Path | None,
        typer.Option(help="Seal with the password in this file's first line (gocryptfs only)."),
    ] = None,
    kbs: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Give a new key to the KBS with this admin address; it "
                     "is on no disk here, unless --key-out asks for it."),
    ] = None,
    key_id: Annotated[
        str | None, typer.Option(metavar="URI", help="Its name there: kbs:///REPO/TYPE/TAG.")
    ] = None,
    admin_key: Annotated[Path | None, typer.Option(help="The KBS's admin key (PEM).")] = None,
    owner_key: Annotated[
        Path | None,
        typer.Option(help="Key that signs the release record (PEM, Ed25519); made if missing."),
    ] = None,
    record_out: Annotated[
        Path | None,
        typer.Option(help="Write the signed release record, which holds the key, to this file."),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the model, for its manifest.")] = "",
    licence: Annotated[
        str, typer.Option("--licence", "--licence-name", help="SPDX name of its licence.")
    ] = "",
    licence_file: Annotated[Path | None, typer.Option(help="Full text of its licence.")] = None,
    terms_file: Annotated[
        Path | None, typer.Option(help="What its users must acknowledge, word for word.")
    ] = None,
    origin: Annotated[
        str, typer.Option("--source", metavar="URI", help="Where the model comes from.")
    ] = "",
    revision: Annotated[str, typer.Option(help="Its commit or version there.")] = "",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also seal pickles, which run code when loaded.")
    ] = False,
    allow_remote_code: Annotated[
        bool,
        typer.Option("--allow-remote-code", help="Hosts may run Python that comes with the model."),
    ] = False,
    pad: Annotated[
        bool, typer.Option("--pad", help="Round stored sizes up, by 12 % at most, to hide them.")
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(metavar="OLD", help="Sealed model of the revision before: what did not change "
                     "is not written again."),
    ] = None,
    old_key_file: Annotated[
        Path | None, typer.Option(help="Key of OLD, and of the new one if no other is chosen.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on where a killed run stopped.")
    ] = True,
    openssf_signature: Annotated[
        Path | None,
        typer.Option(help="Refuse a model that this OpenSSF model-signing bundle does not sign."),
    ] = None,
    openssf_public_key: Annotated[
        Path | None, typer.Option(help="Key of that bundle's signer (PEM, EC).")
    ] = None,
    openssf_key: Annotated[
        Path | None, typer.Option(help="Make such a bundle with this private key (PEM, EC).")
    ] = None,
    openssf_out: Annotated[
        Path | None, typer.Option(help="Where it goes; it names every file in clear.")
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Seal the model in DIR: authenticated, and readable only with its key.

    A run that was killed is gone on with by the same command.
    """
    from cai.model.gocryptfs.config import KEY_LOG2_N, PASSWORD_LOG2_N
    from cai.model.gocryptfs.sealing import seal_gocryptfs
    from cai.model.layout import GOCRYPTFS, METHOD
    from cai.model.sealing import check_places, seal

    terminal = current()
    gocryptfs = method == GOCRYPTFS
    if method != METHOD and not gocryptfs:
        known = "use --method cai or gocryptfs"
        message, hint = _LATER.get(method, (f"unknown method {method!r}", known))
        raise UsageError(message, hint=hint)
    if gocryptfs and pad:
        raise UsageError("--pad is for --method cai")
    source = directory.absolute()
    target = out or source.parent / f"{source.name}.sealed"
    openssf = _OpenSsf(openssf_signature, openssf_public_key, openssf_key, openssf_out)
    openssf.check(source, target)
    if against and not (key_file or key_out or kbs or password_file):
        if gocryptfs:
            password_file = old_key_file
        else:
            key_file = old_key_file
    try:
        check_places(directory, target)
    except UsageError:
        drop_staged(key_out or source.parent / f"{source.name}.key")
        raise
    keys = ModelKeys.chosen(
        source, target, key_out=key_out, key_file=key_file, kbs=kbs, key_id=key_id,
        admin_key=admin_key, owner_key=owner_key, record_out=record_out, gocryptfs=gocryptfs,
        password_file=password_file,
    )
    options = _options(
        name, licence, licence_file, terms_file,
        {"source": origin, "revision": revision} | openssf.provenance(),
        pickle=allow_pickle, remote_code=allow_remote_code, pad=pad,
    )
    old_key = old_key_file or key_file or password_file
    with _older(against, old_key) as older, keys.undone_on_failure():
        keys.stage()
        if keys.password is not None:
            report = seal_gocryptfs(
                directory, target, keys.password, options=options, progress=terminal.progress,
                before_commit=lambda sealed: keys.place(sealed, terminal), against=older,
                sign=keys.sign(), review=openssf.review(name, keys),
                log2_n=PASSWORD_LOG2_N if password_file else KEY_LOG2_N,
            )
        else:
            report = seal(
                directory, target, keys.kek, options=options, progress=terminal.progress,
                before_commit=lambda sealed: keys.place(sealed, terminal), against=older,
                journal=keys.journal, sign=keys.sign(), review=openssf.review(name, keys),
                resume=resume,
            )
        keys.finish()
    _tell(terminal, report, target, keys)


@contextmanager
def _older(sealed: Path | None, key_file: Path | None) -> Iterator[SealedModel | None]:
    """The revision before, opened."""
    from cai.model import open_model
    from cai.model.opening import read_key

    if sealed is None:
        yield None
        return
    if key_file is None:
        raise UsageError("--against needs the key of the older revision", hint="--old-key-file F")
    with open_model(sealed, read_key(sealed, key_file)) as model:
        yield model


@dataclass(frozen=True, slots=True)
class _OpenSsf:
    """What the OpenSSF options ask for."""

    signature: Path | None
    public_key: Path | None
    key: Path | None
    out: Path | None

    def check(self, source: Path, target: Path) -> None:
        """Refuse half of a pair, and a bundle where it would be sealed or published."""
        from cai.cli.key_files import refuse_public_place

        if (self.signature is None) != (self.public_key is None):
            raise UsageError("--openssf-signature needs --openssf-public-key, and that one it")
        if (self.key is None) != (self.out is None):
            raise UsageError("--openssf-key needs --openssf-out, and that one it")
        if self.out is not None:
            refuse_public_place(self.out, source, target)

    def provenance(self) -> dict[str, str]:
        """What the manifest says of a bundle that was checked."""
        if self.public_key is None:
            return {}
        from hashlib import sha256

        key = read_settings_file(self.public_key, what="OpenSSF key")
        return {"openssf-signed-by": f"key with SHA-256 {sha256(key).hexdigest()} (PEM)"}

    def review(self, name: str, keys: ModelKeys) -> Callable[[Manifest], None]:
        """Checks and makes bundles over what was really sealed."""

        def review(manifest: Manifest) -> None:
            from cai.model.openssf import verify_bundle, write_bundle

            entries = manifest.entries.values()
            if self.signature and self.public_key:
                verify_bundle(entries, self.signature, self.public_key)
            if self.key and self.out:
                write_bundle(entries, name, self.key, self.out)
                keys.made(self.out)

        return review


def _options(
    name: str, licence: str, licence_file: Path | None, terms_file: Path | None,
    provenance: dict[str, str], *, pickle: bool, remote_code: bool, pad: bool,
) -> SealOptions:
    from cai.model import Licence, SealOptions
    from cai.model.manifest import MAX_NAME, MAX_PROVENANCE_VALUE
    from cai.model.options import PICKLE_FLAG, REMOTE_CODE_FLAG

    for option, value, most in (
        ("name", name, MAX_NAME),
        *((option, value, MAX_PROVENANCE_VALUE) for option, value in provenance.items()),
    ):
        if len(value.encode("utf-8", "surrogateescape")) > most:
            raise LimitExceeded(f"--{option} is longer than {most} bytes")
    return SealOptions(
        name=name, pad=pad,
        allow=(PICKLE_FLAG,) * pickle + (REMOTE_CODE_FLAG,) * remote_code,
        licence=Licence(
            name=licence, text=_text(licence_file, "licence"), terms=_text(terms_file, "terms")
        ),
        provenance={key: value for key, value in provenance.items() if value} | _tools(),
    )


def _tools() -> dict[str, str]:
    """What sealed it, beside the version of cai that the writer notes itself."""
    import platform
    from importlib.metadata import version

    return {"python": platform.python_version(), "cryptography": version("cryptography")}


def _text(path: Path | None, what: str) -> str:
    if path is None:
        return ""
    try:
        return read_settings_file(path, what=what).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} {path} is not UTF-8") from error


def _tell(terminal: Terminal, report: SealReport, target: Path, keys: ModelKeys) -> None:
    facts: dict[str, Any] = report.to_json() | {"out": str(target)}
    lines = [
        f"sealed {report.files} files into {target}",
        f"model root    {report.root}",
        f"content root  {report.content_root}",
    ]
    if report.resumed:
        lines.append(f"went on after an interrupted run: {report.resumed} objects were there")
    if report.carried:
        lines.append(f"carried over  {report.carried} unchanged files of the older revision")
    keys.tell(facts, lines)
    terminal.result(facts, "\n".join(lines))
