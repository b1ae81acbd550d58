"""The guest that the VMs boot: a kernel of the tree, and an initrd that holds busybox, modules and a test's script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.host import PEERS_TREE
from tests.peers.processes import unused
from tests.peers.tree import kernel
from virtio_mem.boot.initrd import build_initrd

BUSYBOX = PEERS_TREE / "usr/bin/busybox"

EPILOGUE = "poweroff -f\n"


def make_initrd(directory: Path, script: str, modules: Sequence[str] = ()) -> Path:
    """An initrd in `directory` that loads modules, with those that they need, runs a shell script, and powers off.

    UsageError where there is no such module. All of busybox's commands are there; `/dev`, `/proc` and `/sys` are
    mounted.
    """
    path = unused(directory, "initrd", "")
    path.write_bytes(build_initrd(kernel(), BUSYBOX, script.rstrip("\n") + "\n" + EPILOGUE, modules))
    return path
