"""The guest-request virtqueue: takes requests off the ring, has them served, and puts the responses back.

A chain that can't hold a request, or has no room for a response, is returned with length 0 and counted; the queue
goes on. What the ring itself finds malformed never gets here: it is returned and counted there.
"""

from __future__ import annotations

from typing import NamedTuple

from vhost_user.chain import Chain
from vhost_user.errors import PeerError
from vhost_user.vring import DeviceQueue
from virtio_mem.protocol import REQUEST_SIZE, RESPONSE_SIZE, Request, Response
from virtio_mem.service import DeviceService


class Progress(NamedTuple):
    """What a call of `process()` came to: whether the driver wants an interrupt, and whether requests are left."""

    notify: bool
    more: bool


def read_request(chain: Chain) -> Request:
    """The request that a chain holds. PeerError, its field the reason to count, for a chain that can't be served."""
    if chain.readable < REQUEST_SIZE:
        limit = f"has to be {REQUEST_SIZE} bytes or more to read"
        raise PeerError("request_too_short", chain.readable, limit)
    if chain.writable < RESPONSE_SIZE:
        limit = f"has to be {RESPONSE_SIZE} bytes or more to write"
        raise PeerError("no_room_for_response", chain.writable, limit)
    try:
        return Request.decode(chain.read(0, REQUEST_SIZE))
    except PeerError as error:
        raise PeerError("memory_gone", error.value, error.limit) from error


def write_response(chain: Chain, response: Response) -> int:
    """Put a response into a chain; how many bytes it has. PeerError as `read_request`."""
    try:
        chain.write(response.encode())
    except PeerError as error:
        raise PeerError("memory_gone", error.value, error.limit) from error
    return RESPONSE_SIZE


class GuestRequestQueue:
    """Serves one ring for one device."""

    def __init__(self, service: DeviceService, queue: DeviceQueue) -> None:
        self.service = service
        self.queue = queue

    def process(self) -> Progress:
        """Serve what is available, at most one ringful, so that no guest can keep the host busy for ever.

        Raises PeerError (RingBroken) where the ring can't be read on; it then needs a device reset.
        """
        queue, budget, more = self.queue, self.queue.size, True
        queue.disable_notifications()
        while budget and more:
            budget -= 1
            chain = queue.pop()
            if chain is not None:
                self._serve(chain)
                continue
            more = queue.enable_notifications()
            if more:
                queue.disable_notifications()
        return Progress(queue.should_notify(), more)

    def _serve(self, chain: Chain) -> None:
        try:
            response = self.service.request(read_request(chain))
            written = write_response(chain, response)
        except PeerError as error:
            self.queue.reject(chain, error.field)
        else:
            self.queue.push(chain, written)
