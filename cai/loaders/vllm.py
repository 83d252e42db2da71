"""The vLLM load format ``cai``: weights straight from the sealed model into the engine.

vLLM finds ``register`` by the entry point group ``vllm.general_plugins`` and calls it in each of
its processes; then ``--load-format cai`` reads tensors from the sealed model that the loader's
settings name, with no mount and no plain copy of the weights. What vLLM reads as files (the
configuration and the tokenizer) it takes from the directory given as ``--model``;
``python -m cai.loaders.vllm`` puts those into memory and starts vLLM's server over them:

    python -m cai.loaders.vllm model.sealed --key-file model.key -- --uds run/engine.sock

By hand, with a directory SMALL of the small files:

    vllm serve SMALL --load-format cai --model-loader-extra-config
        '{"sealed": "model.sealed", "key_file": "model.key", "expect_root": "<hex>"}'

``DefaultModelLoader`` keeps its own work (tensor parallelism, quantisation, tracking of weights);
only where the weights come from is replaced.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import runpy
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from cai.errors import CaiError, NoSpace, SettingError, UsageError, from_os_error
from cai.loaders.opening import open_tree
from cai.loaders.tensors import iterate_safetensors, read_whole, weight_files
from cai.model.tree import EntryType, ModelTree
from cai.settings import refuse_unknown

LOAD_FORMAT = "cai"

SETTINGS = ("sealed", "key_file", "expect_root")
"""Members of ``--model-loader-extra-config`` that are ours; others go to vLLM's own loader."""

MAX_SMALL = 256 * 1024 * 1024
"""Most bytes of configuration and tokenizer files, all together."""

MEMORY = Path("/dev/shm")  # noqa: S108 - a tmpfs; the directory made in it is private
SERVER = "vllm.entrypoints.openai.api_server"


def register() -> None:
    """Make ``--load-format cai`` known; vLLM calls this once in each process, or more often."""
    from vllm.model_executor import model_loader

    model_loader.register_model_loader(LOAD_FORMAT)(_loader_class())


def sealed_weights(
    settings: dict[str, Any], *, prefix: str = ""
) -> Generator[tuple[str, Any], None, None]:
    """Every weight of a sealed model, as torch tensors.

    Args:
        settings: ``sealed``, ``key_file`` and perhaps ``expect_root``.
        prefix: put before each name.

    Raises:
        SettingError: a member is missing or of the wrong kind.
        CaiError: the model cannot be opened or does not authenticate.
    """
    for name in SETTINGS[:2]:
        if not isinstance(settings.get(name), str) or not settings[name]:
            raise SettingError(
                f"the load format cai needs {name!r}",
                hint='--model-loader-extra-config \'{"sealed": …, "key_file": …}\'',
            )
    root = settings.get("expect_root")
    if root is not None and not isinstance(root, str):
        raise SettingError("expect_root is not a text", hint="give 64 hex digits")
    tree = open_tree(settings["sealed"], settings["key_file"], expect_root=root)
    try:
        for path in weight_files(tree):
            for name, tensor in iterate_safetensors(tree, path, framework="pt"):
                yield prefix + name, tensor
    finally:
        tree.close()


def stage_small_files(tree: ModelTree, directory: Path) -> int:
    """Write every file but the weights into a private directory.

    Args:
        tree: the opened model.
        directory: an existing, empty directory; it should be in memory.

    Returns:
        Bytes written.

    Raises:
        UsageError: they are more than ``MAX_SMALL`` bytes.
        NoSpace, StorageError: they cannot be written.
        Tampered: a file does not authenticate.
    """
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
    small = [entry for entry in tree.entries.values() if not entry.path.endswith(weights)]
    total = sum(entry.size for entry in small if entry.type is EntryType.FILE)
    if total > MAX_SMALL:
        raise UsageError(
            f"{total >> 20} MiB of files besides the weights, at most {MAX_SMALL >> 20} are staged",
            hint="mount the model instead",
        )
    try:
        for entry in small:
            target = directory / entry.path
            if entry.type is EntryType.DIRECTORY:
                target.mkdir(mode=0o700)
            elif entry.type is EntryType.FILE:
                content = read_whole(tree, entry.path, limit=MAX_SMALL)
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                with os.fdopen(os.open(target, flags, 0o600), "wb") as file:
                    file.write(content)
        # Links last, so that nothing is written through one.
        for entry in small:
            if entry.type is EntryType.SYMLINK:
                (directory / entry.path).symlink_to(entry.target)
    except OSError as error:
        raise from_os_error(error, "write the model's configuration to memory") from error
    return total


def private_memory() -> Path:
    """A directory in memory that only this user can enter; its files may be swapped.

    Raises:
        NoSpace: there is no file system in memory.
        StorageError: it cannot be made.
    """
    if not MEMORY.is_dir() or not stat.S_ISVTX & MEMORY.stat().st_mode:
        raise NoSpace(f"{MEMORY} is not there", hint="mount the model, and give vLLM the mount")
    try:
        return Path(tempfile.mkdtemp(prefix="cai-", dir=MEMORY))
    except OSError as error:
        raise from_os_error(error, f"make a directory in {MEMORY}") from error


def main(arguments: Sequence[str]) -> None:
    """``python -m cai.loaders.vllm SEALED --key-file FILE [--expect-root HEX] [-- VLLM OPTIONS]``.

    Raises:
        CaiError: the arguments or the model will not do.
    """
    own = argparse.ArgumentParser(prog="python -m cai.loaders.vllm", description=main.__doc__)
    own.add_argument("sealed")
    own.add_argument("--key-file", required=True)
    own.add_argument("--expect-root")
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    given = own.parse_args(arguments[:cut])
    with open_tree(given.sealed, given.key_file, expect_root=given.expect_root) as tree:
        here = Path(given.sealed)
        settings = {
            "sealed": str(here.resolve()) if here.exists() else given.sealed,
            "key_file": str(Path(given.key_file).resolve()), "expect_root": tree.root,
        }  # fmt: skip
        directory = private_memory()
        try:
            stage_small_files(tree, directory)
            tree.close()
            sys.argv = [
                SERVER, "--model", str(directory), "--load-format", LOAD_FORMAT,
                "--model-loader-extra-config", json.dumps(settings), *arguments[cut + 1 :],
            ]  # fmt: skip
            runpy.run_module(SERVER, run_name="__main__")
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def _loader_class() -> type:
    from vllm.model_executor import model_loader

    class SealedModelLoader(model_loader.DefaultModelLoader):  # type: ignore[misc, unused-ignore]
        """vLLM's default loader over the weights of a sealed model."""

        def __init__(self, load_config: Any) -> None:
            extra = load_config.model_loader_extra_config
            extra = dict(extra) if isinstance(extra, dict) else {}
            self._settings = {name: extra.pop(name) for name in SETTINGS if name in extra}
            refuse_unknown(extra, ("enable_weights_track",), where="model-loader-extra-config")
            # The default loader refuses members that it does not know.
            own = copy.copy(load_config)
            own.model_loader_extra_config = extra
            super().__init__(own)

        def download_model(self, model_config: Any) -> None:
            """Nothing to download: what is needed is read when it is needed."""

        def _get_weights_iterator(self, source: Any) -> Generator[tuple[str, Any], None, None]:
            if source.subfolder is not None:
                raise UsageError(
                    f"this model has weights in the folder {source.subfolder!r}, which the load "
                    "format cai does not read", hint="mount the model",
                )  # fmt: skip
            self.counter_before_loading_weights = time.perf_counter()
            return sealed_weights(self._settings, prefix=source.prefix)

    return SealedModelLoader


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except CaiError as error:
        hint = f"\ncai: hint: {error.hint}" if error.hint else ""
        sys.stderr.write(f"cai: {error.message}{hint}\n")
        sys.exit(error.exit_status)
