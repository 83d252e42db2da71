"""``cai mount``: a sealed model as an ordinary read-only folder."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cai.errors import StorageError, UsageError
from cai.terminal import JsonFlag, Terminal, current

if TYPE_CHECKING:
    from cai.model.opening import AnyModel
    from cai.mount import Kind


def mount(
    sealed: Annotated[
        str, typer.Argument(help="Directory of the sealed model, or its URI: read on demand.")
    ],
    mount_point: Annotated[Path, typer.Argument(help="An empty directory to mount it on.")],
    key_file: Annotated[Path, typer.Option("--key-file", help="File with the model's key.")],
    kind: Annotated[
        str,
        typer.Option(
            help="fuse decrypts what is read; passthrough each file into memory when it is "
            "opened; tmpfs all of it into memory first; auto chooses by kernel and memory."
        ),
    ] = "auto",
    expect_root: Annotated[
        str | None, typer.Option(metavar="HEX", help="Refuse any model root but this one.")
    ] = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay, and unmount on Ctrl-C or SIGTERM.")
    ] = False,
    uid: Annotated[
        int | None,
        typer.Option(min=0, metavar="UID", help="Let this user own and read the files."),
    ] = None,
    allow_other: Annotated[
        bool, typer.Option("--allow-other", help="Let every user read what the modes allow.")
    ] = False,
    log_file: Annotated[
        Path | None,
        typer.Option(help="Where a FUSE mount in the background logs (default: system log)."),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Mount a sealed model read-only. It stays mounted until `cai unmount`.

    A reader gets authentic bytes or an I/O error, and nothing is written in clear to a disk.
    """
    from cai.mount import Kind, choose, device, place
    from cai.mount import mount as mount_tree

    terminal = current()
    logging.basicConfig(format="cai: %(levelname)s: %(message)s")
    choose(kind)  # what cannot be is said before the model is opened
    place.prepare(mount_point)
    where = mount_point.absolute()
    with closing(_open(sealed, key_file, expect_root)) as model:
        chosen, reason = choose(kind, model)

        def show(as_kind: Kind, ready: Callable[[dict[str, Any]], None], *, stay: bool) -> None:
            with _progress(terminal, model, as_kind) as advance:
                mounted = mount_tree(
                    model, where, kind=as_kind, uid=uid, allow_other=allow_other,
                    progress=advance,
                )  # fmt: skip
            facts = {
                "kind": mounted.kind.value, "mount_point": str(mounted.mount_point),
                "model_id": model.model_id, "root": model.root, "pid": os.getpid(),
                "reason": mounted.reason or reason,
            }  # fmt: skip
            if not stay:
                ready(facts)
                return
            with mounted:
                ready(facts)
                mounted.wait()

        def tell(facts: dict[str, Any]) -> None:
            _tell(terminal, facts, foreground=foreground)

        if chosen is not Kind.TMPFS and not foreground:
            from cai.mount import background

            # In the child the choice stays open between pass-through and FUSE, not to tmpfs.
            wanted = Kind.AUTO if kind == Kind.AUTO and chosen is Kind.PASSTHROUGH else chosen
            try:
                tell(
                    background.start(
                        lambda ready: show(wanted, ready, stay=True), log_file=log_file
                    )
                )
                return
            except StorageError as error:
                if kind != Kind.AUTO or error.machine_code != device.MOUNT_REFUSED:
                    raise
                chosen, reason = Kind.TMPFS, f"FUSE cannot be used: {error.message}"
        show(chosen if chosen is Kind.TMPFS else Kind(kind), tell, stay=foreground)


def _open(sealed: str, key_file: Path, expect_root: str | None) -> AnyModel:
    from cai.cli.check import warn_unprotected
    from cai.loaders.opening import in_a_store, open_tree
    from cai.model.opening import open_any, read_key

    if expect_root is not None and not re.fullmatch(r"[0-9a-f]{64}", expect_root):
        raise UsageError("--expect-root is not 64 lower-case hex digits", hint="see cai inspect")
    if in_a_store(sealed):
        return open_tree(sealed, key_file, expect_root=expect_root)
    directory = Path(sealed.removeprefix("file://").removeprefix("file:")).absolute()
    model = open_any(directory, read_key(directory, key_file), expect_root=expect_root)
    warn_unprotected(current(), model, directory)
    return model


def _progress(
    terminal: Terminal, model: AnyModel, kind: Kind
) -> AbstractContextManager[Callable[[int], None]]:
    from cai.mount import Kind

    if kind is not Kind.TMPFS:
        # Nothing takes long, and the workers must not be forked from among a display's threads.
        return nullcontext(lambda _amount: None)
    return terminal.progress("decrypting", sum(entry.size for entry in model.entries.values()))


def _tell(terminal: Terminal, facts: dict[str, Any], *, foreground: bool) -> None:
    where, kind, reason = facts["mount_point"], facts["kind"], facts["reason"]
    because = f" ({reason})" if reason else ""
    end = "Ctrl-C unmounts" if foreground else f"cai unmount {where}"
    terminal.result(facts, f"mounted on {where} by {kind}{because}\nto end it: {end}")
