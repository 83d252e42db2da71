"""Trustee's protocol as pure steps, its sessions and its tokens."""
