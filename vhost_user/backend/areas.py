"""Inflight areas of rings whose front end shares no buffer for them: private ones, that somebody outside keeps."""

from __future__ import annotations

from vhost_user.backend.vring import Vring
from vhost_user.inflight import InflightBuffer, area_size
from vhost_user.owned_fd import OwnedFd, close_all


class Areas:
    """The private inflight areas of a session's rings."""

    def __init__(self) -> None:
        self._left: dict[int, OwnedFd] = {}
        self._made: dict[int, OwnedFd] = {}

    def take_over(self, index: int, fd: OwnedFd) -> None:
        """A ring that is started next has had this one."""
        self._left[index] = fd

    def open(self, vring: Vring) -> InflightBuffer:
        """The area for a ring that starts: the one that it had, or a new one."""
        packed = vring.packed
        if (fd := self._left.pop(vring.index, None)) is None:
            fd = InflightBuffer.create(1, vring.size, packed=packed).fd
            self._made[vring.index] = fd.duplicate()
        with fd:
            size = area_size(vring.size, packed)
            return InflightBuffer.open(fd, size, 0, 1, vring.size, packed=packed)

    def made(self, index: int) -> OwnedFd | None:
        """The new one, once."""
        return self._made.pop(index, None)

    def forget_made(self) -> None:
        """Those that were made are not wanted: their rings did not start."""
        close_all(self._made.values())
        self._made.clear()

    def close(self) -> None:
        """Let go of those that nobody asked for."""
        self.forget_made()
        close_all(self._left.values())
        self._left.clear()
