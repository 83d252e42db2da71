"""Method gocryptfs: directories that stock gocryptfs mounts, with a manifest that it lacks.

gocryptfs v2 authenticates blocks but not the tree: a zeroed block, a file cut at a block, a
swapped, missing or older file pass unseen. So the manifest beside the cipher directory pins every
block, and reading, mounting and checking refuse what it does not name (docs/spec-gocryptfs.md).
"""

from __future__ import annotations
