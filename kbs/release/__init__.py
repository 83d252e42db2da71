"""The decision to give a resource, and everything that hangs on it."""
