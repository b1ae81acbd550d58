"""A part of a peer's file, mapped: for what is shared with a peer besides guest memory.

The peer chose the descriptor, the offset and the size, and may truncate the file at any moment. So all three are
checked before the file is mapped, and the mapping is guarded: see mapping.py. It begins at the page that the offset
lies in.
"""

from __future__ import annotations

import errno
import mmap
import os

from vhost_user.errors import HostError, PeerError
from vhost_user.mapping import MAP_NORESERVE, Mapping, page_size_of
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import ByteCount, HostAddress, HostOffset, align_up

_UNFIT = {errno.EACCES, errno.ENODEV, errno.EPERM, errno.EINVAL, errno.EBADF}
"""What mmap(2) says of a descriptor that is not open for reading and writing, is sealed, or is none of a file."""


class Window:
    """`size` bytes of the file `fd` from `offset` on, shared, readable and writable, at `address` in this process.

    The descriptor stays the caller's, and may be closed at once. `what` is a name for errors. Raises PeerError for a
    size of 0, for a part that is not within the file, and for a file that can't be mapped; HostError where the host has
    no room for the mapping.
    """

    def __init__(self, what: str, fd: int | OwnedFd, size: int, offset: int) -> None:
        number = fd if isinstance(fd, int) else fd.fileno()
        if size <= 0:
            raise PeerError(f"{what} size", size, "1 byte or more")
        held = _size_of(what, number)
        if not 0 <= offset <= offset + size <= held:
            raise PeerError(f"{what} offset", f"{offset:#x}+{size:#x}", f"within the {held:#x} bytes of its file")
        page_size = page_size_of(number)
        self._skip = offset % page_size
        start, end = offset - self._skip, align_up(offset + size, page_size)
        try:
            self._mapping = Mapping(
                ByteCount(end - start), mmap.MAP_SHARED | MAP_NORESERVE, number, HostOffset(start), guarded=True
            )
        except HostError as error:
            if error.errno in _UNFIT:
                raise PeerError(f"{what} fd", number, "a file that can be mapped, to be read and written") from error
            raise
        self.size = ByteCount(size)
        self.address = HostAddress(self._mapping.address + self._skip)

    def view(self, offset: int = 0, size: int | None = None) -> memoryview:
        """A writable view of `size` bytes from `offset`, of all without it. While it lives, `close()` refuses."""
        size = self.size - offset if size is None else size
        assert 0 <= offset <= offset + size <= self.size
        return self._mapping.view(HostOffset(self._skip + offset), ByteCount(size))

    @property
    def dead(self) -> bool:
        """Whether an access met memory that the host can't provide: the file was truncated. Not once it is closed."""
        return self._mapping.dead

    def close(self) -> None:
        """Unmap. Raises BufferError while a view lives; closing twice is allowed."""
        self._mapping.close()


def _size_of(what: str, fd: int) -> int:
    try:
        return os.fstat(fd).st_size
    except OSError as error:
        raise HostError.from_os_error(f"{what} fd", fd, "fstat", error) from error
