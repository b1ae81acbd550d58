"""Host mappings that Python code can't outlive.

A `memoryview` over memory that has been unmapped is a crash waiting for a reader. The standard library's `mmap` object
counts the views taken of it and refuses to close under them, but it can neither be told an address nor an alignment,
and keeps a duplicate of the file descriptor for as long as it lives: with the 509 regions that a peer may ask for, half
of the usual descriptor limit. So the C core maps and unmaps (csrc/mapping_api.h), and what counts the views is their
reference to an object that stands for the memory: it is unmapped when the last one lets go of that. `close()` lets go
of the mapping's own, and takes it back where the object is there still: then somebody has a view.

Alignment: huge pages need mappings aligned to their size, and transparent huge pages can only be used where address and
file offset agree modulo 2 MiB. Where the last mapping was there is mostly room for the next, and it is aligned. Else
addresses are reserved, where need be more by the alignment, and the memory is placed over them with MAP_FIXED.

Guarded mappings: the file of a peer can be truncated under its mapping, and then the next access is a SIGBUS. The C
core's own accesses fail in good order; for the others, by a view, a guarded mapping has its range in the C core's
registry. At the first fault the mapping is `dead`, and an access by a view that met one finds private zeros in the
place of all its memory, for good. The range leaves the registry when the addresses are unmapped, not before, so that a
`close()` that is refused, and a view that outlives its `Mapping`, leave nothing unguarded.
"""

from __future__ import annotations

import errno
import mmap

from vhost_user import _native
from vhost_user.errors import HostError, PeerError, UsageError
from vhost_user.units import ByteCount, HostAddress, HostOffset, align_up, format_size, is_power_of_two

MAP_NORESERVE = 0x4000
"""mmap(2); the `mmap` module has it from Python 3.12 on."""

_HOST_IS_SHORT = {0, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC, errno.ENFILE}
"""What the host says where it is at its end, 0 without a system call; all else that mmap(2) says is about the file."""

PAGE_SIZE = mmap.PAGESIZE
PMD_SIZE = 2 << 20
"""What one transparent huge page spans on x86-64 and on arm64 with 4 KiB pages."""


def page_size_of(fd: int) -> ByteCount:
    """The page size in bytes of a mapping of the file `fd`: that of its huge pages on a hugetlbfs. -1 is no file.

    Raises HostError where the descriptor can't be asked.
    """
    if fd == -1:
        return ByteCount(PAGE_SIZE)
    try:
        return ByteCount(_native.page_size(fd))
    except OSError as error:
        raise HostError.from_os_error("fd", fd, "fstatfs", error) from error


class Mapping:
    """`size` bytes of host memory at `address`, unmapped by `close()` and never under a live view.

    `fd` of -1 maps anonymous memory. `flags` are mmap(2)'s: MAP_SHARED or MAP_PRIVATE, MAP_NORESERVE. `alignment` in
    bytes is a power of two; without it, 2 MiB for mappings of 2 MiB or more and one page for smaller ones, and a huge
    page for huge pages. `page_size` is that of the file, where the caller knows it. With `guarded`, memory that the
    host can't provide does not end the process: see above. Raises UsageError for a size or offset that is not a
    multiple of the file's page size, HostError where the kernel refuses and where the C core has no room for another
    guarded mapping.
    """

    def __init__(
        self,
        size: ByteCount,
        flags: int,
        fd: int = -1,
        offset: HostOffset = HostOffset(0),
        *,
        alignment: int = 0,
        guarded: bool = False,
        page_size: int = 0,
    ) -> None:
        # The kernel would round up a mapping of huge pages, over what lies behind it.
        page_size = page_size or page_size_of(fd)
        alignment = max(alignment or (PMD_SIZE if size >= PMD_SIZE else PAGE_SIZE), page_size)
        assert is_power_of_two(alignment) and alignment >= PAGE_SIZE
        if size % page_size or size <= 0:
            raise UsageError("size", size, f"has to be a multiple of the page size, {page_size}")
        if offset % page_size or offset < 0:
            raise UsageError("offset", offset, f"has to be a multiple of the page size, {page_size}")
        self.size = size
        self.flags = flags
        if fd == -1:
            flags |= mmap.MAP_ANONYMOUS
        try:
            self._mapped = _native.Mapped(size, alignment, flags, fd, offset, page_size if guarded else 0)
        except (_native.MapError, OverflowError) as error:
            raise _refusal(size, error) from error
        self.address = HostAddress(self._mapped.address)

    def view(self, offset: HostOffset = HostOffset(0), size: ByteCount | None = None) -> memoryview:
        """A writable view of `size` bytes from `offset`. While it or a slice of it lives, `close()` refuses."""
        size = ByteCount(self.size - offset) if size is None else size
        if offset < 0 or size < 0 or offset + size > self.size:
            raise UsageError("range", f"{offset}+{size}", f"has to lie within the mapping's {self.size} bytes")
        return self._mapped.view(offset, offset + size)

    @property
    def lifeline(self) -> object:
        """What the views of this mapping hold: the memory stays mapped as long as it lives."""
        return self._mapped.lifeline

    @property
    def dead(self) -> bool:
        """Whether an access to this guarded mapping met memory that the host can't provide. Not once it is closed."""
        return self._mapped.dead

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._mapped.closed

    def close(self) -> None:
        """Unmap. Raises BufferError while a view lives; closing twice is allowed."""
        self._mapped.close()

    def __enter__(self) -> Mapping:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refusal(size: ByteCount, error: _native.MapError | OverflowError) -> HostError:
    if isinstance(error, OverflowError) or error.step == _native.RESERVE:
        return HostError("size", format_size(size), f"no room in the address space ({error})")
    if error.step == _native.MAP:
        return HostError.from_os_error("size", format_size(size), "mmap", error)
    limit = f"there can be {_native.GUARD_SLOTS} guarded mappings at a time"
    return HostError("mapping", "one more", limit, "close others first", errno=error.errno or 0)


def map_part(fd: int, offset: int, size: int) -> tuple[Mapping, HostOffset]:
    """Map the `size` bytes from `offset` on of a file that a peer sent: shared, guarded, and the whole pages around.

    Returns the mapping, and where the part begins in it. The descriptor stays the caller's, and may be closed at once.
    Raises PeerError for a size of 0, for a part that is not within the file, and for what can't be mapped, read and
    written; HostError where the host has no room for it.
    """
    if size <= 0:
        raise PeerError("size", size, "has to be 1 byte or more")
    try:
        sizes = _native.file_sizes(fd)
    except OSError as error:
        raise HostError.from_os_error("fd", fd, "fstat or fstatfs", error) from error
    if sizes is None:
        raise PeerError("fd", fd, "has to be a file: a memfd, or one on a tmpfs, hugetlbfs or disk")
    file_size, page_size = sizes
    if not 0 <= offset <= offset + size <= file_size:
        limit = f"has to lie within the file's {file_size:#x} bytes"
        raise PeerError("mmap_offset", f"{offset:#x}+{size:#x}", limit, "send the file after it has its size")
    skip = offset % page_size
    whole = ByteCount(align_up(skip + size, page_size))
    try:
        flags = mmap.MAP_SHARED | MAP_NORESERVE
        mapping = Mapping(whole, flags, fd, HostOffset(offset - skip), guarded=True, page_size=page_size)
        return mapping, HostOffset(skip)
    except HostError as error:
        if error.errno in _HOST_IS_SHORT:
            raise
        raise PeerError(
            "fd", fd, f"has to be a file that can be mapped to be read and written ({error.limit})"
        ) from error
