"""NVIDIA GPUs: attestation report, device certificates and verification (spec-evidence §4)."""
