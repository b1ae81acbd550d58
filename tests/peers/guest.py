"""The guest that the VMs boot: a kernel of the tree, and an initrd that holds busybox, modules and a test's script."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from tests.host import PEERS_TREE
from tests.peers.processes import unused
from tests.peers.tree import kernel
from vhost_user.errors import HostError
from virtio_mem.boot.initrd import build_initrd
from virtio_mem.hostmem.files import next_data

BUSYBOX = PEERS_TREE / "usr/bin/busybox"

EPILOGUE = "poweroff -f\n"

_LOW_MEMORY = 2 << 30
"""Bytes of a guest's memory that its kernel lies in."""

_LOG = 128 << 10
"""Bytes of a kernel's log that are looked at."""

_AT_ONCE = 32 << 20
"""Bytes of memory that are looked at together."""

_SEARCHED = 8.0
"""Seconds for the search of a guest's memory, which takes a few a gibibyte."""


def make_initrd(directory: Path, script: str, modules: Sequence[str] = ()) -> Path:
    """An initrd in `directory` that loads modules, with those that they need, runs a shell script, and powers off.

    UsageError where there is no such module. All of busybox's commands are there; `/dev`, `/proc` and `/sys` are
    mounted.
    """
    path = unused(directory, "initrd", "")
    path.write_bytes(build_initrd(kernel(), BUSYBOX, script.rstrip("\n") + "\n" + EPILOGUE, modules))
    return path


def kernel_logs(vmm: int, most: int) -> Iterator[str]:
    """The last `most` characters of each kernel's log in the memory of the guest of process `vmm`, as far as that is
    memfds and can be searched within seconds, and whether or not the kernel has printed it. One that was begun before a
    reset may be there still. Says so where there is none."""
    end, found = time.monotonic() + _SEARCHED, False
    for memory in _memfds(vmm):
        for at, text in _logs_in(memory, end):
            yield f"kernel's log at {at:#x}:\n{text[-most:]}"
            found = True
    if not found:
        yield "no kernel's log was found"


def _memfds(pid: int) -> Iterator[Path]:
    """Each once, however often it is open. None where the process has ended."""
    seen = set()
    with suppress(FileNotFoundError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # it was closed meanwhile
                inode = link.stat().st_ino
                if inode not in seen and str(link.readlink()).startswith("/memfd:"):
                    seen.add(inode)
                    yield link


def _logs_in(memory: Path, end: float) -> Iterator[tuple[int, str]]:
    """Where each begins, and its records, before each of which is a binary number."""
    for start, content in _data(memory):
        if time.monotonic() > end:
            return
        for begun in re.finditer(rb"Linux version \d[ -~]+(?=[^\[]{0,30}\0)[^\[]{1,40}Command line: ", content):
            if begun.start() < _AT_ONCE:
                records = re.findall(rb"[\t -~]{8,}", content[begun.start() : begun.start() + _LOG])
                yield start + begun.start(), b"\n".join(records).decode()


def _data(memory: Path) -> Iterator[tuple[int, bytes]]:
    """Pieces of a file, from where each begins, so long that a log that begins in one's first _AT_ONCE bytes is in it.
    Holes are not read: they stay holes."""
    with suppress(OSError, HostError), memory.open("rb") as file:  # it was closed meanwhile
        end = 0
        while (start := next_data(file.fileno(), end)) < _LOW_MEMORY:
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            for at in range(start, min(end, _LOW_MEMORY), _AT_ONCE):
                yield at, os.pread(file.fileno(), min(_AT_ONCE + _LOG, end - at), at)
