"""A gateway as a running process: listeners, control interface, log."""
