"""What the vLLM plug-in does before vLLM comes in; the rest is in tests/e2e/test_loaders.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cai.errors import SettingError, UsageError
from cai.loaders import vllm
from cai.loaders.vllm import sealed_weights, stage_small_files
from tests.mount.fake_tree import FakeTree


@pytest.mark.parametrize(
    "settings",
    [{}, {"sealed": "x"}, {"key_file": "x"}, {"sealed": "", "key_file": "x"},
     {"sealed": 1, "key_file": "x"}, {"sealed": "x", "key_file": "x", "expect_root": 1}],
)  # fmt: skip
def test_settings_that_will_not_do(settings: dict[str, object]) -> None:
    with pytest.raises(SettingError):
        next(sealed_weights(settings))


def test_everything_but_the_weights_is_staged(tmp_path: Path) -> None:
    tree = FakeTree({
        "config.json": b"{}", "model.safetensors": b"w" * 99, "old.bin": b"w", "a": None,
        "a/tokenizer.json": b"t", "link": "-> a/tokenizer.json", "a/x.safetensors": b"w",
    })  # fmt: skip
    assert stage_small_files(tree, tmp_path) == 3
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert found == {"config.json", "a", "a/tokenizer.json", "link"}
    assert (tmp_path / "link").read_bytes() == b"t"
    assert (tmp_path / "config.json").stat().st_mode & 0o777 == 0o600


def test_too_much_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "MAX_SMALL", 10)
    with pytest.raises(UsageError, match="staged"):
        stage_small_files(FakeTree({"a": b"x" * 6, "b": b"x" * 5}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_directory_in_memory_is_private() -> None:
    if not vllm.MEMORY.is_dir():
        pytest.skip("no file system in memory")
    made = vllm.private_memory()
    try:
        assert made.stat().st_mode & 0o777 == 0o700
        assert made.stat().st_uid == os.geteuid()
    finally:
        made.rmdir()


def test_the_entry_points_lead_somewhere() -> None:
    import tomllib
    from importlib import import_module

    root = Path(__file__).resolve().parents[2]
    points = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]
    assert points["vllm.general_plugins"] == {"cai": "cai.loaders.vllm:register"}
    for members in points.values():
        for at in members.values():
            module, _colon, name = at.partition(":")
            assert callable(getattr(import_module(module), name))
