"""Evidence: what a guest says of itself, how it is collected, verified and appraised.

Verification is pure: bytes, trust anchors and a time go in, a ``Verdict`` that lists every check
comes out. Sockets, files and clocks stay with the callers. ``kbs`` and ``tng`` import this package;
it imports neither.
"""
