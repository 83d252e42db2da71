"""Keys that protect stored rows: sealing, and the providers of key encryption keys."""
