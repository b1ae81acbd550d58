"""The wire format of vhost-user: bytes, bounds, tables."""
