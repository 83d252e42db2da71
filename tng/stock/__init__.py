"""TNG's own dialect, RATS-TLS: our ends beside stock ones (docs/tng-stock.md)."""
