"""Reads safetensors files straight out of a sealed model, with all cores and bounded memory.

The layout is that of the safetensors project: eight bytes with the length of a JSON header, which
gives each tensor its type, shape and place, then the tensors without gaps. Authenticated plaintext
goes directly into the memory of the tensors; there is no copy of the file.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cai.errors import FormatError, InputMissing, LimitExceeded, Tampered, UsageError
from cai.model.tree import EntryType, FileReader, ModelTree

MAX_HEADER = 100_000_000
"""Largest header, bytes; the limit of the safetensors project."""

MAX_INDEX = 64 * 1024 * 1024
"""Largest ``*.safetensors.index.json``, bytes."""

PIECE = 4 * 1024 * 1024
"""Bytes that one thread reads at a time; a multiple of every chunk size."""

MAX_AHEAD = 256 * 1024 * 1024
"""Bytes of tensors that are read before they are asked for."""

MAX_THREADS = 8
"""Most threads that read."""

INDEX = "model.safetensors.index.json"

_NUMPY = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32",
    "I32": "int32", "U64": "uint64", "I64": "int64", "F16": "float16", "F32": "float32",
    "F64": "float64", "C64": "complex64",
}  # fmt: skip
_TORCH = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32",
    "I32": "int32", "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16",
    "F32": "float32", "F64": "float64", "C64": "complex64", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2,
    "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor lies.

    Attributes:
        name: its name.
        dtype: its type as the file calls it, e.g. ``BF16``.
        shape: elements in each dimension.
        start: offset in the file, bytes.
        size: bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def parse_header(header: bytes, start: int, size: int, *, where: str) -> list[Tensor]:
    """The tensors of a file, in the order in which they lie.

    Args:
        header: the JSON.
        start: offset of the first tensor, bytes.
        size: length of the file, bytes.
        where: names the file in errors.

    Raises:
        FormatError: it breaks the layout: overlaps, gaps, unknown types, wrong lengths.
    """
    try:
        members = json.loads(header, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: its safetensors header is not JSON: {error}") from error
    if not isinstance(members, dict):
        raise FormatError(f"{where}: its safetensors header is not an object")
    members.pop("__metadata__", None)
    found = [_tensor(name, value, start, where) for name, value in members.items()]
    found.sort(key=lambda tensor: (tensor.start, tensor.size))
    end = start
    for tensor in found:
        if tensor.start != end:
            raise FormatError(f"{where}: tensor {tensor.name!r} does not begin where one ends")
        end += tensor.size
    if end != size:
        raise FormatError(f"{where}: tensors end at byte {end} of {size}")
    return found


def weight_files(tree: ModelTree) -> list[str]:
    """The safetensors files of a model that hold its weights, in order.

    Those that the index names, where there is one; else all in the root.

    Raises:
        InputMissing: there are none.
        FormatError: the index is not one.
        Tampered: a file cannot be authenticated.
    """
    if INDEX in tree.entries:
        data = read_whole(tree, INDEX, limit=MAX_INDEX)
        try:
            names = set(json.loads(data, object_pairs_hook=_once)["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(f"{INDEX} is not an index of weights") from error
    else:
        names = {
            path for path, entry in tree.entries.items()
            if path.endswith(".safetensors") and "/" not in path
            and entry.type is not EntryType.DIRECTORY
        }  # fmt: skip
    missing = [name for name in names if name not in tree.entries]
    if missing or not names:
        raise InputMissing(
            f"the model has no file {missing[0]!r}" if missing else "no *.safetensors in the model",
            hint="only safetensors can be loaded without a mount",
        )
    return sorted(names)


def iterate_safetensors(
    tree: ModelTree, path: str, *, framework: str = "numpy", threads: int = 0
) -> Iterator[tuple[str, Any]]:
    """Give every tensor of a file, in the order in which they lie, reading ahead.

    Args:
        tree: the opened model.
        path: the file.
        framework: ``numpy`` or ``pt``.
        threads: how many read; 0 chooses by the machine.

    Yields:
        Name and tensor. Each owns its memory.

    Raises:
        UsageError: no such framework.
        InputMissing: no such file.
        FormatError: it is not a safetensors file, or holds a type that the framework has not.
        Tampered: some byte does not authenticate; tensors given before are authentic.
    """
    new = _frameworks(framework)
    path, size = _resolved(tree, path)
    reader = tree.open(path)
    count = threads or min(MAX_THREADS, os.cpu_count() or 1)
    try:
        tensors = deque(_read_header(reader, path, size))
        with ThreadPoolExecutor(count, thread_name_prefix="cai-tensors") as pool:
            waiting: deque[tuple[Tensor, Any, list[Future[None]]]] = deque()
            ahead = 0
            try:
                while tensors or waiting:
                    while tensors and (not waiting or ahead + tensors[0].size <= MAX_AHEAD):
                        tensor = tensors.popleft()
                        made, room = new(tensor, path)
                        waiting.append((tensor, made, _fetch(pool, reader, tensor, room, path)))
                        ahead += tensor.size
                    tensor, made, pieces = waiting.popleft()
                    for piece in pieces:
                        piece.result()
                    ahead -= tensor.size
                    yield tensor.name, made
            finally:
                pool.shutdown(cancel_futures=True)
    finally:
        reader.close()


def load_safetensors(
    tree: ModelTree, path: str | None = None, *, framework: str = "numpy", threads: int = 0
) -> dict[str, Any]:
    """Load the tensors of one file, or of all weight files of the model.

    Args:
        tree: the opened model.
        path: the file; by default those that ``weight_files`` finds.
        framework: ``numpy`` or ``pt``.
        threads: how many read; 0 chooses by the machine.

    Raises:
        CaiError: as ``iterate_safetensors``.
    """
    return {
        name: tensor
        for file in ([path] if path is not None else weight_files(tree))
        for name, tensor in iterate_safetensors(tree, file, framework=framework, threads=threads)
    }


def read_whole(tree: ModelTree, path: str, *, limit: int) -> bytes:
    """A file's whole content.

    Raises:
        InputMissing: no such file.
        LimitExceeded: it is longer than ``limit`` bytes.
        Tampered: it does not authenticate.
    """
    path, size = _resolved(tree, path)
    if size > limit:
        raise LimitExceeded(f"{path}: {size} bytes, at most {limit} are read")
    content = bytearray(size)
    reader = tree.open(path)
    try:
        if size and reader.readinto(0, memoryview(content)) != size:
            raise Tampered(f"{path} is shorter than it was sealed")
    finally:
        reader.close()
    return bytes(content)


def _resolved(tree: ModelTree, path: str) -> tuple[str, int]:
    """A file's path behind symlinks, and its length."""
    from cai.loaders.paths import resolve

    found = resolve(tree, path)
    entry = tree.entries.get(found)
    if entry is None or entry.type is not EntryType.FILE:
        raise InputMissing(f"no file {path!r} in the model")
    return found, entry.size


def _read_header(reader: FileReader, path: str, size: int) -> list[Tensor]:
    head = bytearray(8)
    if size < 8 or reader.readinto(0, memoryview(head)) != 8:
        raise FormatError(f"{path} is not a safetensors file")
    length = int.from_bytes(head, "little")
    if length > min(MAX_HEADER, size - 8):
        raise FormatError(f"{path} is not a safetensors file: a header of {length} bytes")
    header = bytearray(length)
    if reader.readinto(8, memoryview(header)) != length:
        raise Tampered(f"{path} is shorter than it was sealed")
    return parse_header(bytes(header), 8 + length, size, where=path)


def _tensor(name: str, value: Any, start: int, where: str) -> Tensor:
    wrong = FormatError(f"{where}: tensor {name!r} is not described as safetensors describe one")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise wrong
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise wrong
    numbers = [*shape, *offsets]
    if any(not isinstance(item, int) or isinstance(item, bool) or item < 0 for item in numbers):
        raise wrong
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise FormatError(f"{where}: tensor {name!r} has the unknown type {dtype!r}")
    size = offsets[1] - offsets[0]
    if size != math.prod(shape) * _SIZES[dtype]:
        raise FormatError(f"{where}: tensor {name!r} has {size} bytes for {dtype} {shape}")
    return Tensor(name, dtype, tuple(shape), start + offsets[0], size)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name stands twice")
    return members


def _fetch(
    pool: ThreadPoolExecutor, reader: FileReader, tensor: Tensor, room: memoryview, path: str
) -> list[Future[None]]:
    """Read a tensor into its memory, in pieces that begin with chunks."""

    def read(start: int, end: int) -> None:
        view = room[start - tensor.start : end - tensor.start]
        if reader.readinto(start, view) != len(view):
            raise Tampered(f"{path} is shorter than it was sealed")

    pieces, at, end = [], tensor.start, tensor.start + tensor.size
    while at < end:
        until = min(end, at - at % PIECE + PIECE)
        pieces.append(pool.submit(read, at, until))
        at = until
    return pieces


def _frameworks(name: str) -> Any:
    """The function that makes an empty tensor of a framework, and a view of its bytes."""
    if name == "numpy":
        return _new_numpy
    if name in ("pt", "torch"):
        return _new_torch
    raise UsageError(f"unknown framework {name!r}", hint="known are: numpy, pt")


def _new_numpy(tensor: Tensor, where: str) -> tuple[Any, memoryview]:
    import numpy as np

    if tensor.dtype not in _NUMPY:
        raise FormatError(
            f"{where}: numpy has no type {tensor.dtype} (tensor {tensor.name!r})",
            hint='load it with framework="pt"',
        )
    made = np.empty(tensor.shape, dtype=_NUMPY[tensor.dtype])
    return made, made.reshape(-1).view(np.uint8).data


def _new_torch(tensor: Tensor, where: str) -> tuple[Any, memoryview]:
    import torch

    dtype = getattr(torch, _TORCH[tensor.dtype], None)
    if dtype is None:
        raise FormatError(f"{where}: this torch has no type for {tensor.dtype}")
    # Not uint8 from the start: a view of another type needs memory aligned for it.
    # On the processor, also inside vLLM, which sets another device as the default.
    made = torch.empty(tensor.shape, dtype=dtype, device="cpu")
    if not tensor.size:
        return made, memoryview(b"")
    return made, memoryview(made.view(-1).view(torch.uint8).numpy())
