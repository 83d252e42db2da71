"""The key broker: gives a model's key to a guest that proved itself, and to nobody else.

It speaks Trustee's key broker protocol, so stock guests can use it. Behind the wire: no policy
means no key, every decision is an audit row that is committed before the answer leaves, and all
state lives in one database whose rows are sealed.
"""

from __future__ import annotations
