"""What is released: resources with their versions, and secrets that live elsewhere."""
