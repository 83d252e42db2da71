"""Policies that come with the key broker, as package data."""
