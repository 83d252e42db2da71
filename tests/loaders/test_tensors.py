"""Tensors out of a tree: the layout's rules, equal to the safetensors library, no wrong byte."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from cai.errors import CaiError, FormatError, InputError, InputMissing, Tampered, UsageError
from cai.loaders import tensors
from cai.loaders.tensors import iterate_safetensors, load_safetensors, weight_files
from tests.mount.fake_tree import CHUNK, FakeTree

FILE = "model.safetensors"
TYPES = ["bool", "uint8", "int8", "uint16", "int16", "float16", "int32", "float32", "int64",
         "float64"]  # fmt: skip


def described(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def loaded(content: bytes) -> dict[str, Any]:
    return load_safetensors(FakeTree({FILE: content}))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equal_to_the_library(data: st.DataObject) -> None:
    made = {}
    for number in range(data.draw(st.integers(0, 5))):
        shape = tuple(data.draw(st.lists(st.integers(0, 40), max_size=3)))
        count = int(np.prod(shape))
        values = np.random.default_rng(number).integers(0, 2, count)
        made[f"t{number}"] = values.astype(data.draw(st.sampled_from(TYPES))).reshape(shape)
    content = save(made, metadata={"a": "b"})
    found = loaded(content)
    expected = load(content)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)
        assert found[name].flags.writeable


def test_large_tensors_in_pieces_and_little_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "PIECE", 2 * CHUNK)
    monkeypatch.setattr(tensors, "MAX_AHEAD", 3 * CHUNK)
    rng = np.random.default_rng(1)
    made = {f"t{n}": rng.integers(0, 255, 5 * CHUNK + n, dtype=np.uint8) for n in range(6)}
    tree = FakeTree({FILE: save(made)})
    found = dict(iterate_safetensors(tree, FILE, threads=3))
    for name, tensor in made.items():
        np.testing.assert_array_equal(found[name], tensor)
    assert max(length for _offset, length in tree.readers[0].calls) <= 2 * CHUNK
    assert tree.readers[0].closed


def test_an_unfinished_iteration_lets_go() -> None:
    tree = FakeTree({FILE: save({"a": np.zeros(9), "b": np.ones(9)})})
    walk = iterate_safetensors(tree, FILE)
    next(walk)
    walk.close()  # type: ignore[attr-defined]
    assert tree.readers[0].closed


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"short", struct.pack("<Q", 1 << 63) + b"{}", struct.pack("<Q", 3) + b"{}",
        described(b"not json"), described([]), described(b'{"a": 1}'), described(b"\xff\xfe"),
        described(b'{"a":' * 5000 + b"1" + b"}" * 5000),
        described(b"[" * 200_000),
        described({"a": ONE}, bytes(7)), described({"a": ONE}, bytes(9)),
        described({"a": {**ONE, "dtype": "F31"}}, bytes(8)),
        described({"a": {**ONE, "dtype": ["F32"]}}, bytes(8)),
        described({"a": {**ONE, "shape": [3]}}, bytes(8)),
        described({"a": {**ONE, "shape": [-2]}}, bytes(8)),
        described({"a": {**ONE, "shape": [True, 2]}}, bytes(8)),
        described({"a": {**ONE, "shape": 2}}, bytes(8)),
        described({"a": {**ONE, "data_offsets": [8, 0]}}, bytes(8)),
        described({"a": {**ONE, "data_offsets": [0, 8, 8]}}, bytes(8)),
        described({"a": {**ONE, "more": 1}}, bytes(8)),
        described({"a": ONE, "b": ONE}, bytes(8)),
        described({"a": ONE, "b": {**ONE, "data_offsets": [4, 12]}}, bytes(12)),
        described({"a": ONE, "b": {**ONE, "data_offsets": [12, 20]}}, bytes(20)),
        described(b'{"a":' + json.dumps(ONE).encode() + b',"a":' + json.dumps(ONE).encode() + b"}",
                  bytes(8)),
    ],
)  # fmt: skip
def test_what_breaks_the_layout_is_refused(content: bytes) -> None:
    with pytest.raises(FormatError):
        loaded(content)


@given(st.binary(max_size=200))
def test_nothing_but_our_errors_leaves_the_parser(header: bytes) -> None:
    with contextlib.suppress(CaiError):
        loaded(described(header, bytes(16)))


def test_what_numpy_lacks_is_said() -> None:
    content = described({"a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}, bytes(8))
    with pytest.raises(FormatError, match="BF16") as caught:
        loaded(content)
    assert "pt" in (caught.value.hint or "")


def test_unknown_framework_and_missing_file() -> None:
    tree = FakeTree({FILE: save({"a": np.zeros(1)}), "dir": None})
    with pytest.raises(UsageError):
        load_safetensors(tree, framework="jax")
    for path in ("other.safetensors", "dir"):
        with pytest.raises(InputMissing):
            load_safetensors(tree, path)
    with pytest.raises(InputError):
        load_safetensors(tree, "../model.safetensors")


def noted(walk: Iterator[tuple[str, Any]], seen: dict[str, Any]) -> dict[str, Any]:
    """Walk to the end, noting what came before it."""
    for name, tensor in walk:
        seen.setdefault(name, tensor)
    return {}


def test_a_bad_chunk_gives_no_tensor_of_it() -> None:
    made = {f"t{n}": np.full(CHUNK, n, dtype=np.uint8) for n in range(8)}
    tree = FakeTree({FILE: save(made)})
    tree.bad.add((FILE, 4))
    seen: dict[str, Any] = {}
    with pytest.raises(Tampered):
        seen.update(noted(iterate_safetensors(tree, FILE), seen))
    assert 0 < len(seen) < 5
    for name, tensor in seen.items():
        np.testing.assert_array_equal(tensor, made[name])
    assert tree.readers[0].closed


def test_which_files_hold_the_weights() -> None:
    one, two = save({"a": np.zeros(2)}), save({"b": np.ones(2)})
    index = json.dumps({"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}).encode()
    tree = FakeTree({"x-1.safetensors": one, "x-2.safetensors": two, "extra.safetensors": one,
                     tensors.INDEX: index})  # fmt: skip
    assert weight_files(tree) == ["x-1.safetensors", "x-2.safetensors"]
    assert set(load_safetensors(tree)) == {"a", "b"}
    assert weight_files(FakeTree({"d": None, "d/y.safetensors": one, FILE: one})) == [FILE]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ({"a.bin": b"x"}, InputMissing),
        ({tensors.INDEX: b'{"weight_map": {"a": "gone.safetensors"}}'}, InputMissing),
        ({tensors.INDEX: b'{"weight_map": {"a": ["x"]}}'}, FormatError),
        ({tensors.INDEX: b"[]"}, FormatError),
        ({tensors.INDEX: b"{"}, FormatError),
        ({tensors.INDEX: b'{"weight_map": {"a": "../x"}}'}, InputMissing),
    ],
)
def test_an_index_that_will_not_do(content: dict[str, bytes], error: type[CaiError]) -> None:
    with pytest.raises(error):
        load_safetensors(FakeTree(content))


def test_through_a_symlink() -> None:
    content = save({"a": np.arange(5)})
    tree = FakeTree({"blobs": None, "blobs/x": content, FILE: "-> blobs/x"})
    np.testing.assert_array_equal(load_safetensors(tree)["a"], np.arange(5))
