"""Using a sealed model without a mount: as an fsspec file system, as tensors, inside vLLM.

    import cai

    with cai.open("model.sealed", "model.key") as files:
        config = files.cat("config.json")
        weights = files.load_safetensors(framework="pt")

Every byte comes authenticated or as an error, and nothing is written in clear to a disk.
"""

from __future__ import annotations

from cai.loaders.opening import open_tree
from cai.loaders.tensors import iterate_safetensors, load_safetensors

__all__ = ["iterate_safetensors", "load_safetensors", "open_tree"]
