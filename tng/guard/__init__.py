"""The request guard of an egress: what may reach an OpenAI-compatible backend, and from whom."""
