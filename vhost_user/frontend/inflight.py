"""The inflight buffer as the front end has it: what a back end notes of its requests, kept for the next one."""

from __future__ import annotations

from vhost_user.errors import Refused
from vhost_user.frontend.requests import Requests
from vhost_user.message import FrontendRequest, Inflight
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import ByteCount, HostOffset


class KeptInflight:
    """A buffer that the back end made, or none; the front end never looks into it."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._buffer: tuple[OwnedFd, Inflight] | None = None

    def track(self, num_queues: int, queue_size: int) -> None:
        """Ask for a new buffer, and have the back end use it. Raises Refused where the back end gives none."""
        question = Inflight(ByteCount(0), HostOffset(0), num_queues, queue_size)
        area, fds = self._requests.ask_for_fds(FrontendRequest.GET_INFLIGHT_FD, Inflight, question)
        if not fds:
            raise Refused("GET_INFLIGHT_FD", "no descriptor", "the area's memory has to come with the reply")
        self.close()
        self._buffer = fds[0], Inflight(area.mmap_size, area.mmap_offset, num_queues, queue_size)
        self.send()

    def send(self) -> None:
        """Have the back end use the buffer, if there is one."""
        if self._buffer is not None:
            fd, area = self._buffer
            self._requests.tell(FrontendRequest.SET_INFLIGHT_FD, area, [fd.fileno()])

    def close(self) -> None:
        """Let go of the buffer; nothing is told to the back end."""
        if self._buffer is not None:
            self._buffer[0].close()
            self._buffer = None
