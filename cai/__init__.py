"""CAI: sealed models, attested key release and attested channels for confidential inference."""

__version__ = "0.1.0"

__all__ = ["__version__"]
