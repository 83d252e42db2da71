"""HTTP: the listeners, their limits and their errors."""
