"""Sealed models: one format behind the interface ``ModelTree`` (docs/spec-format.md).

Example::

    kek = new_key()
    report = seal(Path("model"), Path("model.sealed"), kek)
    with open_model(Path("model.sealed"), kek, expect_root=report.root) as model:
        reader = model.open("config.json")
"""

from __future__ import annotations

from cai.model.checking import CheckReport, check
from cai.model.content import content_root, content_root_of_tree
from cai.model.keys import new_key, read_key_file, write_key_file
from cai.model.manifest import Licence, Manifest
from cai.model.options import SealOptions, SealReport
from cai.model.record import Lease, ReleaseRecord
from cai.model.rekeying import RotateReport, rotate
from cai.model.sealed import SealedModel, open_model, open_model_files, read_header
from cai.model.sealing import reseal, seal
from cai.model.tree import Entry, EntryType, FileReader, ModelTree
from cai.model.unsealing import unseal

__all__ = [
    "CheckReport",
    "Entry",
    "EntryType",
    "FileReader",
    "Lease",
    "Licence",
    "Manifest",
    "ModelTree",
    "ReleaseRecord",
    "RotateReport",
    "SealOptions",
    "SealReport",
    "SealedModel",
    "check",
    "content_root",
    "content_root_of_tree",
    "new_key",
    "open_model",
    "open_model_files",
    "read_header",
    "read_key_file",
    "reseal",
    "rotate",
    "seal",
    "unseal",
    "write_key_file",
]
