"""Intel TDX: quote layout, collateral and verification (docs/spec-evidence.md §2 and §3)."""
