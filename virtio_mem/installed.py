"""Which version of the package this is."""

from __future__ import annotations

from functools import cache


@cache
def version() -> str:
    """The version that was installed; "unknown" where the package is run from a tree that was not."""
    from importlib import metadata  # noqa: PLC0415 - it costs as much as all the rest of a short command

    try:
        return metadata.version("virtio-mem")
    except metadata.PackageNotFoundError:
        return "unknown"
