"""One contiguous part of a zone's host memory: a backing, mapped. What is not populated costs nothing."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Sequence

from vhost_user import _native
from vhost_user.errors import HostError
from vhost_user.mapping import MAP_NORESERVE, PAGE_SIZE, Mapping
from vhost_user.units import ByteCount, HostAddress, HostOffset, format_size
from virtio_mem.hostmem.backed import BackedMemory
from virtio_mem.hostmem.backing import Backing

MADV_POPULATE_WRITE = 23
"""madvise(2), since Linux 5.14; the `mmap` module of Python 3.11 doesn't name it."""

MPOL_BIND = 2
"""mbind(2)."""


class HostMemory(BackedMemory):
    """`size` bytes of `backing`, mapped. Closing this closes both; the backing stays the caller's if this raises.

    `node` is the NUMA node that all pages must come from, decided before the first of them is touched. `advice` is
    given to madvise(2). With `reserve` the kernel promises the memory now or refuses now; without, it is MAP_NORESERVE.
    Offsets are from the start of the part. Raises HostError where the kernel refuses.
    """

    def __init__(
        self,
        backing: Backing,
        size: ByteCount,
        *,
        node: int | None = None,
        advice: Sequence[int] = (),
        reserve: bool = False,
    ) -> None:
        super().__init__(backing, size, node=node)
        flags = (mmap.MAP_SHARED if backing.shared else mmap.MAP_PRIVATE) | (0 if reserve else MAP_NORESERVE)
        alignment = backing.page_size if backing.page_size > PAGE_SIZE else 0
        try:
            self.mapping = Mapping(size, flags, backing.fd, backing.offset, alignment=alignment)
        except HostError as error:
            if reserve and error.errno == errno.ENOMEM:
                error.remedy = "use reserve=off, a smaller size, or a host with more memory"
            raise
        backing.address = self.mapping.address
        try:
            self._set_up(advice)
        except BaseException:
            self.mapping.close()
            raise

    def _set_up(self, advice: Sequence[int]) -> None:
        if self._node is not None:
            try:
                _native.mbind(self.address, self.size, MPOL_BIND, [self._node])
            except OSError as error:
                remedy = "mbind may be forbidden to this process (seccomp)" if error.errno == errno.EPERM else ""
                raise HostError.from_os_error("host_numa_node", self._node, "mbind", error, remedy) from error
        for number in advice:
            try:
                _native.madvise(self.address, self.size, number)
            except OSError as error:
                raise HostError.from_os_error("size", format_size(self.size), f"madvise({number})", error) from error

    @property
    def address(self) -> HostAddress:
        """Where the memory is in this process."""
        return self.mapping.address

    @property
    def shareable_fd(self) -> int | None:
        """The file to hand to other processes, this memory beginning at `file_offset` in it; None if it is private."""
        return self.backing.fd if self.backing.shared else None

    @property
    def has_shared_zero_page(self) -> bool:
        """Whether reading untouched memory makes the host allocate nothing."""
        return self.backing.has_shared_zero_page

    def view(self, offset: HostOffset = HostOffset(0), size: ByteCount | None = None) -> memoryview:
        """A writable view of a range; while it lives, `close()` refuses."""
        return self.mapping.view(offset, size)

    def write(self, offset: HostOffset, data: bytes) -> None:
        """As of BackedMemory. Where others can truncate the file, that is a signal."""
        with self.view(offset, ByteCount(len(data))) as view:
            view[:] = data

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self.mapping.closed

    def _allocate(self, offset: HostOffset, size: ByteCount) -> None:
        _native.madvise(self.address + offset, size, MADV_POPULATE_WRITE)

    def close(self) -> None:
        """Unmap and close. Raises BufferError, and does neither, while a view lives; closing twice is allowed."""
        self.mapping.close()
        self.backing.close()
