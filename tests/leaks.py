"""What this process holds open and mapped, so that a test can be seen to let go of all it took.

Anonymous private memory has no name in /proc/self/maps, and the allocator takes and returns it as it likes: a leak of
that kind has to be looked for by the test that maps it.
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from pathlib import Path


def open_files() -> Counter[str]:
    """What the file descriptors refer to, and how many refer to it."""
    found: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):  # noqa: PTH208 -- a path for each takes longer than all the rest
        try:
            found[os.readlink(f"/proc/self/fd/{fd}")] += 1  # noqa: PTH115 -- for the same reason
        except FileNotFoundError:
            continue  # the directory that was just listed
    return found


def mapped_files() -> Counter[str]:
    """Bytes mapped of each memfd, huge page file and other file, but for code and files that are only read."""
    found: Counter[str] = Counter()
    for line in Path("/proc/self/maps").read_text().splitlines():
        if ".so" in line:
            continue  # nearly all, of some hundred lines that are looked at twice for each test
        addresses, access, _, device, inode, *name = line.split(maxsplit=5)
        if inode != "0" and ("w" in access or "s" in access):
            start, end = (int(address, 16) for address in addresses.split("-"))
            found[f"{''.join(name)} (inode {inode} on {device})"] += end - start
    return found


class Holdings:
    """What is open and mapped at the moment of making."""

    def __init__(self) -> None:
        self._open = open_files()
        self._mapped = mapped_files()

    def leaks(self) -> list[str]:
        """What is held now and was not then, garbage aside."""
        if not self._more():
            return []
        gc.collect()
        return self._more()

    def _more(self) -> list[str]:
        opened = [f"{extra} more open: {target}" for target, extra in (open_files() - self._open).items()]
        mapped = [f"{extra} bytes more mapped: {name}" for name, extra in (mapped_files() - self._mapped).items()]
        return opened + mapped
