"""Our session-bound dialect cai/1 (docs/spec-channel.md)."""
