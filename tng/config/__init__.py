"""The configuration of the gateway, in the dialects of TNG, read strictly."""
