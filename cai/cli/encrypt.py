"""``cai encrypt``: seal a model, and put its key where its owner wants it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cai.errors import LimitExceeded, StorageError, UsageError
from cai.settings import read_settings_file
from cai.terminal import JsonFlag, Terminal, current

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from cai.model import SealOptions, SealReport
    from cai.secret import Secret

_KEY_ID = re.compile(r"kbs:///([\w-][\w.-]*)/([\w-][\w.-]*)/([\w-][\w.-]*)", re.ASCII)
_LATER = {
    "gocryptfs": ("method gocryptfs comes in a later version", "use --method cai"),
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
    method: Annotated[str, typer.Option(help="How it is sealed: cai.")] = "cai",
    key_out: Annotated[
        Path | None, typer.Option(help="Write a new key to this file (default: DIR.key).")
    ] = None,
    key_file: Annotated[Path | None, typer.Option(help="Seal with the key in this file.")] = None,
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
    licence: Annotated[str, typer.Option(help="SPDX name of its licence.")] = "",
    licence_file: Annotated[Path | None, typer.Option(help="Full text of its licence.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also seal pickles, which run code when loaded.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """Seal the model in DIR: authenticated, and readable only with its key."""
    from cai.model.sealing import check_places, seal

    terminal = current()
    if method != "cai":
        message, hint = _LATER.get(method, (f"unknown method {method!r}", "use --method cai"))
        raise UsageError(message, hint=hint)
    source = directory.absolute()
    target = out or source.parent / f"{source.name}.sealed"
    check_places(directory, target)
    keys = _Keys.chosen(
        source, target, key_out=key_out, key_file=key_file, kbs=kbs, key_id=key_id,
        admin_key=admin_key, owner_key=owner_key, record_out=record_out,
    )
    options = _options(name, licence, licence_file, allow_pickle=allow_pickle)
    with keys.undone_on_failure():
        report = seal(
            directory, target, keys.kek, options=options, progress=terminal.progress,
            before_commit=lambda sealed: keys.place(sealed, terminal),
        )
    _tell(terminal, report, target, keys)


@dataclass
class _Keys:
    """Where the key of one sealing comes from and goes to."""

    kek: Secret
    key_out: Path | None = None
    record_out: Path | None = None
    owner: Ed25519PrivateKey | None = None
    new_owner: Path | None = None
    upload: Callable[[bytes], None] | None = None
    created: list[Path] = field(default_factory=list)

    @classmethod
    def chosen(
        cls, source: Path, target: Path, *, key_out: Path | None, key_file: Path | None,
        kbs: str | None, key_id: str | None, admin_key: Path | None, owner_key: Path | None,
        record_out: Path | None,
    ) -> _Keys:
        """Read and check everything that can be wrong before anything is sealed."""
        from cai.model import new_key, read_key_file

        if key_file and (key_out or kbs):
            raise UsageError("--key-file cannot stand beside --key-out or --kbs")
        if not kbs and (key_id or admin_key):
            raise UsageError("--key-id and --admin-key need --kbs", hint="give the KBS's address")
        if kbs and not (key_id and admin_key and owner_key):
            raise UsageError("--kbs needs --key-id, --admin-key and --owner-key")
        if record_out and not owner_key:
            raise UsageError("--record-out needs --owner-key, which signs the record")
        if not (key_file or key_out or kbs):
            key_out = source.parent / f"{source.name}.key"
        for path in (key_out, record_out, owner_key):
            if path is not None:
                _refuse_public_place(path, source, target)
        for path in (key_out, record_out):
            if path is not None:
                _refuse_existing(path)
        keys = cls(read_key_file(key_file) if key_file else new_key(), key_out, record_out)
        if owner_key:
            keys._load_owner(owner_key)
        if kbs and key_id and admin_key:
            keys._prepare_upload(kbs, key_id, admin_key)
        return keys

    def place(self, report: SealReport, terminal: Terminal) -> None:
        """Put key and record in their places, before the sealed model appears."""
        from cai.cli.owner_keys import private_pem
        from cai.model import write_key_file
        from cai.secret import Secret, write_secret_file

        if self.new_owner and self.owner:
            write_secret_file(self.new_owner, private_pem(self.owner), what="owner key")
            self.created.append(self.new_owner)
            terminal.say(f"made the owner key {self.new_owner}: it signs releases, keep it safe")
        if self.key_out:
            write_key_file(self.key_out, self.kek)
            self.created.append(self.key_out)
        if not self.owner or not (self.record_out or self.upload):
            return
        record = self._record(report, self.owner)
        if self.record_out:
            write_secret_file(self.record_out, Secret(record), what="release record")
            self.created.append(self.record_out)
        if self.upload:
            self.upload(record)

    def undone_on_failure(self) -> _Undo:
        """Removes what ``place`` made when the sealing does not end well."""
        return _Undo(self.created)

    def _record(self, report: SealReport, owner: Ed25519PrivateKey) -> bytes:
        from cai.model import ReleaseRecord
        from cai.model.record import public_key_hex

        return ReleaseRecord(
            kek=self.kek, model_id=report.model_id, manifest_root=report.root,
            min_revision=report.revision, index_sha256=report.index_sha256,
            owner_key=public_key_hex(owner), allow=report.allow,
        ).sign(owner)

    def _load_owner(self, path: Path) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        from cai.cli.owner_keys import read_private_key

        if path.is_symlink() or path.exists():
            self.owner = read_private_key(path, what="owner key")
        else:
            self.owner, self.new_owner = Ed25519PrivateKey.generate(), path

    def _prepare_upload(self, kbs: str, key_id: str, admin_key: Path) -> None:
        from cai.cli.kbs_upload import check_address, upload_resource
        from cai.cli.owner_keys import read_private_key

        match = _KEY_ID.fullmatch(key_id)
        if not match:
            raise UsageError(
                f"--key-id {key_id!r} is not a resource name", hint="kbs:///REPO/TYPE/TAG"
            )
        check_address(kbs)
        admin = read_private_key(admin_key, what="admin key")
        resource = "/".join(match.groups())
        self.upload = lambda record: upload_resource(kbs, resource, record, admin)


class _Undo:
    """Removes files that were made, unless the block ends well."""

    def __init__(self, created: list[Path]) -> None:
        self._created = created

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        if kind is not None:
            for path in self._created:
                path.unlink(missing_ok=True)


def _refuse_public_place(path: Path, source: Path, target: Path) -> None:
    place = path.parent.resolve() / path.name
    for directory in (source.resolve(), target.parent.resolve() / target.name):
        if place == directory or directory in place.parents:
            raise UsageError(
                f"{path} is inside {directory}, which is sealed or published",
                hint="choose a place outside of it",
            )


def _refuse_existing(path: Path) -> None:
    if path.is_symlink() or path.exists():
        raise StorageError(
            f"{path} exists already", hint="choose another name; keys are never overwritten"
        )


def _options(
    name: str, licence: str, licence_file: Path | None, *, allow_pickle: bool
) -> SealOptions:
    from cai.model import Licence, SealOptions
    from cai.model.manifest import MAX_NAME

    if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME:
        raise LimitExceeded(f"--name is longer than {MAX_NAME} bytes")
    text = ""
    if licence_file:
        try:
            text = read_settings_file(licence_file, what="licence").decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"licence {licence_file} is not UTF-8") from error
    return SealOptions(
        name=name, licence=Licence(name=licence, text=text),
        allow=("pickle",) if allow_pickle else (),
    )


def _tell(terminal: Terminal, report: SealReport, target: Path, keys: _Keys) -> None:
    from cai.model.record import public_key_hex

    facts: dict[str, Any] = report.to_json() | {"out": str(target)}
    lines = [
        f"sealed {report.files} files into {target}",
        f"model root    {report.root}",
        f"content root  {report.content_root}",
    ]
    if keys.owner:
        facts["owner_key"] = public_key_hex(keys.owner)
        lines.append(f"owner key     {facts['owner_key']}")
    if keys.key_out:
        facts["key_out"] = str(keys.key_out)
        lines.append(f"key           {keys.key_out} - never publish it, and keep a copy")
    if keys.record_out:
        facts["record_out"] = str(keys.record_out)
        lines.append(f"record        {keys.record_out} - it holds the key as well")
    if keys.upload:
        lines.append("the KBS has the release record; nobody gets it before a policy allows it")
    terminal.result(facts, "\n".join(lines))
