"""What the broker's owner may do, over a listener of its own."""
