"""Layer three: Rego policies, where they apply, and what they may see."""
