"""The trusted network gateway: requests go only to guests that proved themselves.

An ingress stands with the client and accepts nothing but a peer whose evidence passes the client's
own policy; an egress stands in front of an engine and proves every session anew. The channel
between them is docs/spec-channel.md. Run it with `tng launch`.
"""
