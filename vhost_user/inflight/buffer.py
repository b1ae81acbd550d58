"""The buffer that front end and back end share: one area for each queue, one after the other, in a file."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from typing import NamedTuple

from vhost_user.errors import HostError, PeerError, UsageError
from vhost_user.inflight.area import ALIGNMENT
from vhost_user.inflight.packed import PackedInflight
from vhost_user.inflight.split import SplitInflight
from vhost_user.owned_fd import OwnedFd
from vhost_user.vring.layout import MAX_QUEUE_SIZE
from vhost_user.window import Window

MAX_QUEUES = 256
"""What a ring's index in SET_VRING_KICK has room for: a queue beyond could never be started."""

_OFFSET_ALIGNMENT = 8
"""Of the areas' widest fields. More is not asked for: a front end may have put the buffer anywhere in its file."""


class NewBuffer(NamedTuple):
    """What answers GET_INFLIGHT_FD: a file, and which part of it the buffer is."""

    fd: OwnedFd
    mmap_size: int
    mmap_offset: int


def area_size(queue_size: int, packed: bool) -> int:
    """Bytes of one queue's area: head and entries, rounded up to a multiple of 64."""
    return (PackedInflight if packed else SplitInflight).shape.size(queue_size)


class InflightBuffer:
    """The areas of `num_queues` queues with `queue_size` descriptors each, in the file `fd`; see `open()`."""

    def __init__(self, window: Window, num_queues: int, queue_size: int, *, packed: bool) -> None:
        self.num_queues = num_queues
        self.queue_size = queue_size
        self.packed = packed
        self._window = window
        self._areas: dict[int, SplitInflight | PackedInflight] = {}

    @classmethod
    def create(cls, num_queues: int, queue_size: int, *, packed: bool) -> NewBuffer:
        """A file with a buffer in which nothing is in flight; it is not mapped.

        Raises PeerError for numbers that no device has, HostError where the host has no room.
        """
        size = _check_counts(num_queues, queue_size, packed)
        try:
            fd = OwnedFd(os.memfd_create("inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        except OSError as error:
            raise HostError.from_os_error("inflight", size, "memfd_create", error) from error
        try:
            os.ftruncate(fd.fileno(), size)
        except OSError as error:
            fd.close()
            raise HostError.from_os_error("inflight", size, "ftruncate", error) from error
        # Whoever maps it is then safe from the other one. Where it can't be sealed, our mappings are guarded anyway.
        with suppress(OSError):
            fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        return NewBuffer(fd, size, 0)

    @classmethod
    def open(
        cls, fd: int | OwnedFd, mmap_size: int, mmap_offset: int, num_queues: int, queue_size: int, *, packed: bool
    ) -> InflightBuffer:
        """Map the buffer that SET_INFLIGHT_FD tells of. The descriptor stays the caller's, and may be closed at once.

        Raises PeerError for numbers that no device has, a part of the file that is too small for them or not within
        it, and a file that can't be mapped; HostError where the host has no room for the mapping.
        """
        size = _check_counts(num_queues, queue_size, packed)
        if mmap_size < size:
            raise PeerError("inflight mmap_size", mmap_size, f"has to be {size} bytes or more for {num_queues} queues")
        if mmap_offset % _OFFSET_ALIGNMENT:
            raise PeerError("inflight mmap_offset", mmap_offset, f"has to be a multiple of {_OFFSET_ALIGNMENT}")
        return cls(Window("inflight", fd, mmap_size, mmap_offset), num_queues, queue_size, packed=packed)

    def queue(self, index: int) -> SplitInflight | PackedInflight:
        """The area of queue `index`, always the same object. Raises UsageError for a queue that the buffer has not."""
        if not 0 <= index < self.num_queues:
            raise UsageError("queue", index, f"has to be one of the buffer's {self.num_queues}")
        if index not in self._areas:
            kind = PackedInflight if self.packed else SplitInflight
            size = kind.shape.size(self.queue_size)
            self._areas[index] = kind(self._window.view(size * index, size), self.queue_size)
        return self._areas[index]

    @property
    def dead(self) -> bool:
        """Whether the file was truncated: what is in flight is not kept any more. Not once it is closed."""
        return self._window.dead

    def close(self) -> None:
        """Unmap the buffer. No queue uses an area any more; closing twice is allowed."""
        for area in self._areas.values():
            area.close()
        self._areas.clear()
        self._window.close()


def _check_counts(num_queues: int, queue_size: int, packed: bool) -> int:
    """The bytes that the areas need, which are one behind the other."""
    if not 1 <= num_queues <= MAX_QUEUES:
        raise PeerError("inflight num_queues", num_queues, f"has to be 1 to {MAX_QUEUES}")
    if not 1 <= queue_size <= MAX_QUEUE_SIZE:
        raise PeerError("inflight queue_size", queue_size, f"has to be 1 to {MAX_QUEUE_SIZE}")
    size = area_size(queue_size, packed)
    assert size % ALIGNMENT == 0
    return num_queues * size
