"""The Rego engine loads on machines that lack a library it names but does not use."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cai.errors import CaiError
from kbs.policy import rego_library
from kbs.policy.rego_library import empty_library, load_rego


def test_the_engine_loads_and_evaluates() -> None:
    interpreter = load_rego().Interpreter()
    interpreter.add_module("policy", "package policy\n\nallow := 1 + 1 == 2\n")
    assert interpreter.query("x = data.policy.allow").ok()


NAMED = """
import ctypes
from kbs.policy import rego_library

rego_library._SONAME = b"libnobody-has-this.so.1"
rego_library._load_empty_library()
ctypes.CDLL("libnobody-has-this.so.1")
"""


def test_an_empty_library_takes_its_name() -> None:
    """The loader then finds the name among what is loaded, as it does for a NEEDED entry."""
    with pytest.raises(OSError, match="cannot open"):
        ctypes.CDLL("libnobody-has-this.so.1")
    # A process of its own: the loader remembers libraries by the path they came from as well.
    subprocess.run([sys.executable, "-c", NAMED], check=True, timeout=60)


def test_the_library_is_a_shared_object_of_this_machine() -> None:
    data = empty_library(62)
    assert data[:6] == b"\x7fELF\x02\x01"
    assert int.from_bytes(data[16:18], "little") == 3
    assert int.from_bytes(data[18:20], "little") == 62


def test_an_engine_that_cannot_be_loaded_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "regopy", None)
    with pytest.raises(CaiError) as caught:
        load_rego()
    assert caught.value.machine_code == "rego-engine"
    assert caught.value.hint == "apt-get install libatomic1"


def test_an_unknown_machine_is_left_to_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rego_library, "platform", SimpleNamespace(machine=lambda: "m68k"))
    monkeypatch.setattr(rego_library, "_SONAME", b"libnobody-has-that.so.1")
    rego_library._load_empty_library()
    with pytest.raises(OSError, match="cannot open"):
        ctypes.CDLL("libnobody-has-that.so.1")
