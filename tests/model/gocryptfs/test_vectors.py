"""The known answers of ``tests/vectors/gocryptfs.json``, for other implementations too."""

from __future__ import annotations

import json

from cai.model.manifest import Manifest, model_root
from tests.model.gocryptfs.trees import ROOT
from tests.vectors.make_gocryptfs import make

KNOWN = json.loads((ROOT / "tests" / "vectors" / "gocryptfs.json").read_text())


def test_everything_is_made_again_as_it_was() -> None:
    assert make() == KNOWN


def test_the_manifest_is_one() -> None:
    canonical = KNOWN["manifest"].encode()
    manifest = Manifest.parse(canonical)
    assert manifest.encode() == canonical
    assert model_root(canonical) == KNOWN["model_root"]
    assert manifest.content_root == KNOWN["content_root"]
    assert manifest.cipher is not None
    assert manifest.cipher.files["sub/w"].groups.hex() == KNOWN["file"]["groups"]
    assert "b\udcff" in manifest.entries
