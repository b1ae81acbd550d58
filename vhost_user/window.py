"""A part of a peer's file, mapped: for what is shared with a peer besides guest memory.

The peer chose the descriptor, the offset and the size, and may truncate the file at any moment. So all three are
checked before the file is mapped, and the mapping is guarded: see mapping.py. It begins at the page that the offset
lies in.
"""

from __future__ import annotations

from vhost_user.errors import FieldError
from vhost_user.mapping import map_part
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import ByteCount, HostAddress, HostOffset


class Window:
    """`size` bytes of the file `fd` from `offset` on, shared, readable and writable, at `address` in this process.

    The descriptor stays the caller's, and may be closed at once. `what` is a name for errors, which are those of
    `map_part`.
    """

    def __init__(self, what: str, fd: int | OwnedFd, size: int, offset: int) -> None:
        try:
            self._mapping, self._skip = map_part(fd if isinstance(fd, int) else fd.fileno(), offset, size)
        except FieldError as error:
            error.locate(what)
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
