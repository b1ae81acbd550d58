"""The HTTP API of a machine's memory, on a unix socket; `virtio_mem.api.server` serves it.

Its paths and bodies are those of Cloud Hypervisor's API as far as that concerns memory, and openapi.json describes all
of it. The server is only imported by who serves: it needs h11 (extra `api`).
"""
