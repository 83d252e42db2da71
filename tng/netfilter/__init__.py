"""Transparent capture by nftables, and the guard that outlives the gateway."""
