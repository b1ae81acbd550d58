"""The memory of a QEMU that runs no guest: its RAM, which is shared with us, and the region of its virtio-mem device.

Where the region is a file, the file is ours, and so is the count of what the host holds of it: what QEMU says of itself
is not taken for it. Where it is QEMU's own memory, the kernel tells what QEMU's process has of it.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable

from vhost_user import _native
from vhost_user.errors import HostError
from vhost_user.mapping import PAGE_SIZE, Mapping
from vhost_user.memory import GuestMemory, Region
from vhost_user.units import MIB, ByteCount, GuestAddress, HostAddress, HostOffset
from virtio_mem.conformance.target import TargetFailure
from virtio_mem.conformance.targets.qtest.machine import Machine
from virtio_mem.conformance.targets.qtest.tmpfs import Tmpfs
from virtio_mem.hostmem import facts, files
from virtio_mem.hostmem.backing import Anonymous, Hugetlb, Memfd

RAM = ByteCount(16 * MIB)
"""Enough for QEMU's tables and the driver's ring."""

MEMDEV = "region"
"""The name of the memory backend."""


class Ram:
    """The guest's RAM: a memfd that QEMU maps too. `memory` has it at guest address 0."""

    def __init__(self) -> None:
        self.fd = files.memfd("virtio-mem:qtest:ram", RAM)
        try:
            self._mapping = Mapping(RAM, mmap.MAP_SHARED, self.fd)
        except BaseException:
            os.close(self.fd)
            raise
        self.memory = GuestMemory([Region(GuestAddress(0), RAM, self._mapping)])

    def arguments(self, name: str) -> list[str]:
        """For QEMU's command line."""
        return ["-object", f"memory-backend-file,id={name},size={RAM},share=on,mem-path=/proc/self/fd/{self.fd}"]

    def close(self) -> None:
        """Let it go. Closing twice is allowed."""
        if self.fd >= 0:
            self.memory.replace(())
            self._mapping.close()
            os.close(self.fd)
            self.fd = -1


class RegionMemory(ABC):
    """What the device's region is made of, `size` bytes."""

    fd = -1
    """The file that QEMU has to inherit, if there is one."""

    def refuse(self, refuses: bool) -> None:
        """While `refuses`, the host has no memory to give for it, and takes none back."""
        raise NotImplementedError

    @abstractmethod
    def arguments(self) -> list[str]:
        """For QEMU's command line: the memory backend MEMDEV. Nothing of it is allocated or promised by the host."""

    @abstractmethod
    def require_headroom(self) -> None:
        """Raise HostError unless the host has all of it to give now."""

    @abstractmethod
    def held(self, machine: Machine, addr: GuestAddress, offset: int, size: int) -> int:
        """Bytes that the host holds for a range of the region, which is at `addr`. HostError where it doesn't tell."""

    @abstractmethod
    def close(self) -> None:
        """Let it go. Closing twice is allowed."""


class File(RegionMemory):
    """A memfd of ours, of ordinary or of huge pages."""

    def __init__(self, backing: Memfd | Hugetlb, size: int) -> None:
        self._backing = backing
        self._size = size
        self.fd = backing.fd

    def arguments(self) -> list[str]:
        """See `RegionMemory`."""
        return [
            "-object",
            f"memory-backend-file,id={MEMDEV},size={self._size},share=on,reserve=off,mem-path=/proc/self/fd/{self.fd}",
        ]

    def require_headroom(self) -> None:
        """As the file's pages come."""
        self._backing.require_headroom(self._size, None)

    def held(self, _machine: Machine, _addr: GuestAddress, offset: int, size: int) -> int:
        """Whoever touched it."""
        return self._backing.held(HostOffset(offset), ByteCount(size))

    def close(self) -> None:
        """See `RegionMemory`."""
        self._backing.close()


class Full(File):
    """A file in a file system of its own, which can run full."""

    def __init__(self, size: int) -> None:
        self._tmpfs = Tmpfs(size)
        super().__init__(Memfd(self._tmpfs.fd), size)

    def refuse(self, refuses: bool) -> None:
        """See `RegionMemory`. Only what is allocated when it is plugged notices."""
        self._tmpfs.refuse(refuses)

    def close(self) -> None:
        """See `RegionMemory`."""
        self._tmpfs.close()


class Private(RegionMemory):
    """Anonymous memory of QEMU's process."""

    def __init__(self, size: int) -> None:
        self._size = size

    def arguments(self) -> list[str]:
        """See `RegionMemory`."""
        return ["-object", f"memory-backend-ram,id={MEMDEV},size={self._size},share=off,reserve=off"]

    def require_headroom(self) -> None:
        """As any process's memory."""
        Anonymous().require_headroom(self._size, None)

    def held(self, machine: Machine, addr: GuestAddress, offset: int, size: int) -> int:
        """What the process has touched."""
        address = HostAddress(_host_address(machine, addr) + offset)
        try:
            with open(f"/proc/{machine.pid}/pagemap", "rb", buffering=0) as pagemap:
                return _private_held(pagemap.fileno(), address, size)
        except OSError as error:
            raise HostError.from_os_error("held", f"{offset:#x}+{size:#x}", "pagemap", error) from error

    def close(self) -> None:
        """It goes with QEMU."""


def _host_address(machine: Machine, addr: GuestAddress) -> int:
    """Where QEMU's process has the region. Older versions know only where a guest address is, if the guest sees it."""
    said = machine.execute("x-query-ramblock")["human-readable-text"]
    pattern = rf"^\s*\S*/?{MEMDEV}\s.*\s(0x[0-9a-f]+)\s+r[wo]\s*$"
    if "HVA" not in said:
        said = machine.execute("human-monitor-command", {"command-line": f"gpa2hva {addr:#x}"})
        pattern = rf"^Host virtual address for .*\({MEMDEV}\) is (0x[0-9a-f]+)\s*$"
    found = re.search(pattern, said, re.MULTILINE)
    if found is None:
        raise TargetFailure(f"QEMU does not say where its memory is, but {' '.join(said.split())[:200]!r}")
    return int(found[1], 16)


def _private_held(pagemap: int, address: HostAddress, size: int) -> int:
    try:
        return _native.private_held(pagemap, address, size, scan=True)
    except OSError as error:
        if error.errno != errno.ENOTTY:
            raise
    return _native.private_held(pagemap, address, size, scan=False)


def _memfd(size: int) -> RegionMemory:
    return File(Memfd(files.memfd("virtio-mem:qtest:region", ByteCount(size))), size)


def _hugetlb(size: int) -> RegionMemory:
    page_size = facts.default_hugepage_size()
    fd = files.memfd("virtio-mem:qtest:region", ByteCount(size), page_size)
    return File(Hugetlb(fd, HostOffset(0), page_size, reserved=False), size)


KINDS: dict[str, Callable[[int], RegionMemory]] = {"memfd": _memfd, "hugetlb": _hugetlb, "ram": Private, "tmpfs": Full}
"""How each kind of memory is made, given its size in bytes."""


def page_size_of(kind: str) -> ByteCount:
    """What the sizes of a region of this kind, and of its blocks, are multiples of. HostError without huge pages."""
    return facts.default_hugepage_size() if kind == "hugetlb" else ByteCount(PAGE_SIZE)
