"""The client's side: ways in."""
