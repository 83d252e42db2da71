"""The attestation service: evidence in, a signed appraisal out, nothing released."""
