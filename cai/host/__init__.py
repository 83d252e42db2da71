"""The GPU host's side: attest, fetch the key, keep the mount, prove every channel session.

Everything that touches a key or a quote runs in here; what faces the network (``tng``) asks for
proofs over a Unix socket and never sees either.
"""
